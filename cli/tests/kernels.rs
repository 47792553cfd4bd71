//! Which kernels compute is chosen by flag or environment, told by `inspect --cpu`, and refused where a machine has none.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output, Stdio};

fn inspect(args: &[&str], isa: Option<&str>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_guild"))
        .args(["inspect", "--cpu"])
        .args(args)
        .envs(isa.map(|isa| ("GUILD_ISA", isa)))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn told(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_kernels_asked_for_are_those_chosen() {
    let best = told(&inspect(&[], None));
    assert!(best.contains("chosen: the best that this machine can run"));
    assert!(best.contains("numerics class f32-fma16-v2,"), "{best}");
    let plain = told(&inspect(&[], Some("portable")));
    assert!(
        plain.contains("chosen by --isa; the best would be"),
        "{plain}"
    );
    let dots = told(&inspect(
        &["--isa", "portable", "--numerics", "dot-amx"],
        None,
    ));
    let class = "numerics class f32-fma16-v2+bf16-dot-amx-v1,";
    assert!(dots.contains(class) && dots.contains("slow"), "{dots}");
}

#[test]
fn kernels_that_are_not_there_are_refused_with_those_that_are() {
    let foreign = if cfg!(target_arch = "x86_64") {
        "neon"
    } else {
        "avx2"
    };
    for (args, says) in [
        (["--isa", foreign, "--json"], ["--isa", "portable"]),
        (["--isa", "abacus", "--json"], ["abacus", "avx512-vnni"]),
    ] {
        let output = inspect(&args, None);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(says.iter().all(|says| stderr.contains(says)), "{stderr}");
    }
    let output = inspect(&["--isa", "portable", "--numerics", "dot"], None);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("--numerics dot") && stderr.contains("dot-avx512"));
}
