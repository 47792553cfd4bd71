//! The Python environment of the client tests: a virtual environment in the
//! target directory, made once and remade when its requirements change.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::recipe::runs;
use crate::system;

const REQUIREMENTS: &str = include_str!("../requirements.txt");
/// Asks for what `python -m venv` needs; Debian ships it as a package of its own.
const PROBE: [&str; 2] = ["-c", "import venv, ensurepip"];
const PACKAGES: [&str; 2] = ["python3", "python3-venv"];

/// The interpreter that has the client libraries, making the environment first
/// when there is none. Installs python3-venv through apt-get where that is
/// allowed.
pub(crate) fn interpreter(target: &Path) -> Result<PathBuf> {
    let venv = environment(target)?;
    let stamp = venv.join("requirements.installed");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == REQUIREMENTS) {
        return Ok(venv.join("bin/python"));
    }
    let list = venv.join("requirements.txt");
    fs::write(&list, REQUIREMENTS).with_context(|| format!("cannot write {}", list.display()))?;
    eprintln!("== python clients: pip install into {}", venv.display());
    pip(&venv, &["--requirement".as_ref(), list.as_os_str()])?;
    fs::write(&stamp, REQUIREMENTS).with_context(|| format!("cannot write {}", stamp.display()))?;
    Ok(venv.join("bin/python"))
}

/// A command line tool from the Python index, installed on first use.
pub(crate) fn tool(target: &Path, name: &str) -> Result<PathBuf> {
    let venv = environment(target)?;
    let program = venv.join("bin").join(name);
    if !program.exists() {
        pip(&venv, &[name.as_ref()])?;
    }
    Ok(program)
}

fn environment(target: &Path) -> Result<PathBuf> {
    let venv = target.join("venv");
    if runs(
        &venv.join("bin/python").to_string_lossy(),
        &["-c", "import pip"],
    ) {
        return Ok(venv);
    }
    if !runs("python3", &PROBE) {
        system::install("python clients", &PACKAGES);
        if !runs("python3", &PROBE) {
            bail!(
                "python3 with venv is missing and could not be installed; \
                 as root: apt-get install {}",
                PACKAGES.join(" ")
            );
        }
    }
    let made = Command::new("python3")
        .args(["-m", "venv", "--clear"])
        .arg(&venv)
        .stdin(Stdio::null())
        .status()
        .context("cannot start python3")?;
    if !made.success() {
        bail!("python3 -m venv {} failed ({made})", venv.display());
    }
    Ok(venv)
}

fn pip(venv: &Path, what: &[&std::ffi::OsStr]) -> Result<()> {
    let status = Command::new(venv.join("bin/python"))
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ])
        .args(what)
        .stdin(Stdio::null())
        .status()
        .context("cannot start pip")?;
    if !status.success() {
        bail!("pip install failed ({status}); the Python package index must be reachable");
    }
    Ok(())
}
