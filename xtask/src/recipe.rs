//! The recipes: each is a list of named steps, run in order until one fails.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::{python, system};

/// What is tested has fail points that act; what `demo` and the README serve has none.
pub(crate) const FAIL_POINTS: &str = "guild/failpoints";

/// Runs steps and remembers what became of each for the closing summary.
pub(crate) struct Steps {
    recipe: &'static str,
    root: PathBuf,
    started: Instant,
    done: Vec<String>,
}

impl Steps {
    pub(crate) fn new(recipe: &'static str) -> Self {
        Self {
            recipe,
            root: root(),
            started: Instant::now(),
            done: Vec::new(),
        }
    }

    pub(crate) fn run(&mut self, name: &str, command: &mut Command) -> Result<()> {
        eprintln!("== {name}: {}", shown(command));
        let begun = Instant::now();
        let status = command
            .current_dir(&self.root)
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("{name}: cannot start {:?}", command.get_program()))?;
        let seconds = begun.elapsed().as_secs();
        if !status.success() {
            let passed = self.done.join(", ");
            bail!(
                "{} FAILED at {name} ({status}); passed before it: {}. Alone: {}",
                self.recipe,
                if passed.is_empty() {
                    "nothing"
                } else {
                    &passed
                },
                shown(command)
            );
        }
        self.done.push(format!("{name} {seconds}s"));
        Ok(())
    }

    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        eprintln!("== {name}: skipped, {why}");
        self.done.push(format!("{name} SKIPPED ({why})"));
    }

    pub(crate) fn finish(self) {
        let all = self.started.elapsed().as_secs();
        eprintln!(
            "== {} passed in {all}s: {}",
            self.recipe,
            self.done.join(", ")
        );
    }
}

/// Everything CI runs.
pub(crate) fn test(filter: Option<&str>) -> Result<()> {
    let mut steps = Steps::new("test");
    checks(&mut steps)?;
    steps.run(
        "build",
        &mut cargo(&[
            "build",
            "--workspace",
            "--bins",
            "--tests",
            "--features",
            FAIL_POINTS,
        ]),
    )?;

    let target = target_dir()?;
    let clients = python::interpreter(&target);
    if let Err(error) = &clients {
        steps.skip("python clients", &format!("{error:#}"));
    }
    if let Err(error) = system::etcd() {
        steps.skip("etcd", &format!("{error:#}"));
    }
    if let Err(error) = system::prometheus() {
        steps.skip("prometheus", &format!("{error:#}"));
    }
    let mut tests = if runs("cargo", &["nextest", "--version"]) {
        let mut nextest = vec![
            "nextest",
            "run",
            "--workspace",
            "--no-fail-fast",
            "--no-tests=pass",
            "--features",
            FAIL_POINTS,
        ];
        nextest.extend(filter);
        cargo(&nextest)
    } else {
        let mut test = vec![
            "test",
            "--workspace",
            "--no-fail-fast",
            "--lib",
            "--bins",
            "--tests",
            "--features",
            FAIL_POINTS,
        ];
        test.extend(filter);
        let mut one_by_one = cargo(&test);
        // What .config/nextest.toml says of clusters, said to the plain runner.
        one_by_one.env("RUST_TEST_THREADS", "1");
        one_by_one
    };
    // The one just built: tests that start processes need not build it again.
    tests.env("GUILD_BIN", target.join("debug").join("guild"));
    if let Ok(interpreter) = &clients {
        tests.env("GUILD_TEST_PYTHON", interpreter);
    }
    steps.run("tests", &mut tests)?;
    if filter.is_none() {
        steps.run(
            "doc tests",
            // The features of the tests, or all rooms would be built once more for it.
            &mut cargo(&[
                "test",
                "--workspace",
                "--doc",
                "--quiet",
                "--features",
                FAIL_POINTS,
            ]),
        )?;
    }
    steps.finish();
    Ok(())
}

/// The checks alone.
pub(crate) fn lint() -> Result<()> {
    let mut steps = Steps::new("lint");
    checks(&mut steps)?;
    steps.finish();
    Ok(())
}

fn checks(steps: &mut Steps) -> Result<()> {
    for (component, probe) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        if !runs("cargo", &[probe, "--version"]) {
            steps.run(
                component,
                Command::new("rustup").args(["component", "add", component]),
            )?;
        }
    }
    steps.run("format", &mut cargo(&["fmt", "--all", "--check"]))?;
    steps.run(
        "clippy",
        &mut cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]),
    )?;
    steps.run(
        "docs",
        cargo(&["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    if runs("cargo", &["deny", "--version"]) {
        let check = ["deny", "--all-features", "check"];
        let offline = [&check[..], &["bans", "licenses", "sources"]].concat();
        steps.run("deny", &mut cargo(&offline))?;
        if runs("cargo", &["deny", "fetch", "db"]) {
            let advisories = [&check[..], &["advisories"]].concat();
            steps.run("advisories", &mut cargo(&advisories))?;
        } else {
            steps.skip("advisories", "their database is out of reach");
        }
    } else {
        steps.skip("deny", "cargo-deny is not installed");
    }
    Ok(())
}

/// Formats the tree.
pub(crate) fn fmt() -> Result<()> {
    let mut steps = Steps::new("fmt");
    steps.run("format", &mut cargo(&["fmt", "--all"]))
}

/// Serves the demo checkpoint until it is stopped.
pub(crate) fn demo(flags: &[String]) -> Result<()> {
    let mut command = cargo(&["run", "--release", "--", "up", "--model", "models/demo"]);
    let error = command.args(flags).current_dir(root()).exec();
    Err(error).context("cannot start cargo")
}

/// Measures the kernels against the machine, and whole clusters serving `model`.
pub(crate) fn bench(model: &str, prompt_tokens: u32, repeats: u32, no_kernels: bool) -> Result<()> {
    let mut steps = Steps::new("bench");
    steps.run("build", &mut cargo(&["build", "--release"]))?;
    let roofline = ["run", "--release", "-p", "guild-kernels", "--example"];
    if !no_kernels {
        steps.run("kernels", cargo(&roofline).arg("roofline"))?;
    }
    let whole = ["run", "--release", "-p", "guild-tests", "--example"];
    steps.run(
        "throughput",
        cargo(&whole)
            .args(["throughput", "--", model])
            .args([prompt_tokens.to_string(), repeats.to_string()])
            .env("GUILD_BIN", target_dir()?.join("release").join("guild")),
    )?;
    steps.finish();
    Ok(())
}

/// Makes the client environment and says where it is.
pub(crate) fn clients() -> Result<()> {
    let interpreter = python::interpreter(&target_dir()?)?;
    eprintln!("GUILD_TEST_PYTHON={}", interpreter.display());
    Ok(())
}

/// Renders each kustomization and validates what comes out.
pub(crate) fn manifests() -> Result<()> {
    let mut steps = Steps::new("manifests");
    if !runs("kubectl", &["version", "--client"]) {
        bail!("kubectl is not installed: it renders deploy/ (kubectl kustomize)");
    }
    let target = target_dir()?;
    let validate = python::tool(&target, "kubernetes-validate")?;
    for folder in ["base", "overlays/demo"] {
        let rendered = target.join(format!("{}.yaml", folder.replace('/', "-")));
        let mut render = Command::new("kubectl");
        render
            .args(["kustomize", "--output"])
            .arg(&rendered)
            .arg(format!("deploy/{folder}"));
        steps.run(&format!("render {folder}"), &mut render)?;
        let mut check = Command::new(&validate);
        check.arg("--strict").arg(&rendered);
        steps.run(&format!("validate {folder}"), &mut check)?;
    }
    steps.finish();
    Ok(())
}

/// True when the program is there and answers.
pub(crate) fn runs(program: &str, args: &[&str]) -> bool {
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.args(args);
    command
}

/// Where cargo builds: honours CARGO_TARGET_DIR and every cargo configuration.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let output = Command::new("cargo")
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .stdin(Stdio::null())
        .output()
        .context("cannot run cargo metadata")?;
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
    let target = metadata["target_directory"]
        .as_str()
        .context("cargo metadata: no target")?;
    Ok(PathBuf::from(target))
}

fn shown(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}
