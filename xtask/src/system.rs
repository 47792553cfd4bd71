//! Packages of the operating system that tests need, through apt-get.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::recipe::runs;

/// What the store's tests run.
const ETCD: [&str; 1] = ["etcd-server"];

/// Makes sure that `etcd` can be run, installing it where that is allowed.
pub(crate) fn etcd() -> Result<()> {
    let there = || runs("etcd", &["--version"]);
    if !there() {
        install("etcd", &ETCD);
        if !there() {
            bail!(
                "etcd is missing and could not be installed; as root: apt-get install {}",
                ETCD.join(" ")
            );
        }
    }
    Ok(())
}

/// Makes sure that a Prometheus can be run, installing it where that is allowed.
pub(crate) fn prometheus() -> Result<()> {
    let there = || runs("prometheus", &["--version"]) && runs("promtool", &["--version"]);
    if !there() {
        install("prometheus", &["prometheus"]);
        if !there() {
            bail!(
                "prometheus is missing and could not be installed; as root: apt-get install prometheus"
            );
        }
    }
    Ok(())
}

/// Best effort: the caller looks again whether it helped.
pub(crate) fn install(what_for: &str, packages: &[&str]) {
    let update: &[&str] = &["apt-get", "-q", "update"];
    let install: Vec<&str> = ["apt-get", "-q", "-y", "--no-install-recommends", "install"]
        .into_iter()
        .chain(packages.iter().copied())
        .collect();
    for line in [update, &install] {
        // `sudo -n` never asks: without rights it fails and the tests say so.
        let (program, args) = if runs("sh", &["-c", "test \"$(id -u)\" = 0"]) {
            (line[0], &line[1..])
        } else {
            ("sudo", line)
        };
        let mut command = Command::new(program);
        if program == "sudo" {
            command.arg("-n");
        }
        eprintln!("== {what_for}: {}", line.join(" "));
        let ran = command
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .status();
        if !ran.is_ok_and(|status| status.success()) {
            return;
        }
    }
}
