//! Configuration: which layer wins, and what is refused how.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use guild_node::config::{ConfigError, Loaded, Origin, load_from};
use guild_node::{ExitKind, HasExitKind};

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Serve),
    Other(Other),
}

#[derive(Debug, Args)]
struct Serve {
    #[arg(long)]
    model: PathBuf,
    #[arg(long, default_value_t = 64)]
    max_running: u32,
    #[arg(long)]
    insecure: bool,
    #[arg(long, value_delimiter = ',')]
    token_ids: Vec<u32>,
    #[arg(long)]
    temperature: Option<f32>,
    #[arg(long)]
    config: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Other {
    #[arg(long)]
    lease: Option<u32>,
    #[arg(long)]
    config: Option<PathBuf>,
}

fn load(args: &str, env: &[(&str, &str)]) -> Result<Loaded<Cli>, ConfigError> {
    let env: HashMap<&str, &str> = env.iter().copied().collect();
    let args = std::iter::once("guild").chain(args.split_whitespace());
    load_from(args.map(OsString::from), &|name| {
        env.get(name).map(OsString::from)
    })
}

fn serve(args: &str, env: &[(&str, &str)]) -> Serve {
    match load(args, env).unwrap().value.command {
        Command::Serve(serve) => serve,
        other => panic!("{other:?}"),
    }
}

struct File(tempfile::TempDir);

impl File {
    fn new(text: &str) -> File {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("guild.toml"), text).unwrap();
        File(dir)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("guild.toml")
    }

    fn arg(&self) -> String {
        format!("--config {}", self.path().display())
    }
}

#[test]
fn flag_over_environment_over_file_over_default() {
    let file = File::new("model = \"m\"\nmax-running = 1\n");
    let env = [("GUILD_MAX_RUNNING", "2")];
    assert_eq!(serve("serve --model m", &[]).max_running, 64);
    assert_eq!(serve(&format!("serve {}", file.arg()), &[]).max_running, 1);
    assert_eq!(serve(&format!("serve {}", file.arg()), &env).max_running, 2);
    let all = format!("serve {} --max-running 3", file.arg());
    assert_eq!(serve(&all, &env).max_running, 3);

    let loaded = load(&all, &env).unwrap();
    assert_eq!(loaded.origins.of("max-running"), &Origin::CommandLine);
    assert_eq!(
        loaded.origins.of("model"),
        &Origin::File {
            path: file.path(),
            key: "model".into()
        }
    );
    assert_eq!(loaded.origins.of("temperature"), &Origin::Default);
    let loaded = load(&format!("serve {}", file.arg()), &env).unwrap();
    assert_eq!(
        loaded.origins.of("max-running"),
        &Origin::Environment("GUILD_MAX_RUNNING".into())
    );
}

#[test]
fn every_kind_of_value_can_stand_in_the_file() {
    let file =
        File::new("model = \"a b\"\ninsecure = true\ntoken-ids = [1, 2, 3]\ntemperature = 0.5\n");
    let got = serve(&format!("serve {}", file.arg()), &[]);
    assert_eq!(got.model, Path::new("a b"));
    assert!(got.insecure);
    assert_eq!(got.token_ids, [1, 2, 3]);
    assert_eq!(got.temperature, Some(0.5));
}

#[test]
fn the_environment_names_the_file_and_says_yes_in_many_ways() {
    let file = File::new("model = \"from-file\"\ninsecure = true\n");
    let path = file.path().display().to_string();
    let got = serve(
        "serve",
        &[("GUILD_CONFIG", &path), ("GUILD_INSECURE", "no")],
    );
    assert_eq!(got.model, Path::new("from-file"));
    assert!(!got.insecure);
    for yes in ["1", "true", "YES", "on"] {
        assert!(serve("serve --model m", &[("GUILD_INSECURE", yes)]).insecure);
    }
    assert_eq!(
        serve("serve --model m", &[("GUILD_TOKEN_IDS", "4,5")]).token_ids,
        [4, 5]
    );
    assert_eq!(
        serve("serve --model m", &[("GUILD_MAX_RUNNING", "")]).max_running,
        64,
        "empty is not set"
    );
}

#[test]
fn a_table_is_for_its_command_and_wins_over_the_top() {
    let file = File::new("[serve]\nmodel = \"s\"\nmax-running = 5\n[other]\nlease = 9\n");
    assert_eq!(serve(&format!("serve {}", file.arg()), &[]).max_running, 5);
    match load(&format!("other {}", file.arg()), &[])
        .unwrap()
        .value
        .command
    {
        Command::Other(other) => assert_eq!(other.lease, Some(9)),
        other => panic!("{other:?}"),
    }
    let file = File::new("model = \"m\"\nmax-running = 4\n[serve]\nmax-running = 5\n");
    assert_eq!(serve(&format!("serve {}", file.arg()), &[]).max_running, 5);
}

fn refused(text: &str, command: &str) -> (String, ExitKind) {
    let file = File::new(text);
    let error = load(&format!("{command} {}", file.arg()), &[]).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("guild.toml"), "{text}");
    (text, error.exit_kind())
}

#[test]
fn unknown_keys_are_refused_with_a_hint() {
    let (text, kind) = refused("model = \"m\"\nmax-runing = 1\n", "serve");
    assert!(
        text.contains("unknown key `max-runing`; did you mean `max-running`?"),
        "{text}"
    );
    assert_eq!(kind, ExitKind::Config);
    let (text, _) = refused("max_running = 1\n", "serve");
    assert!(text.contains("did you mean `max-running`?"), "{text}");
    let (text, _) = refused("qqq = 1\n", "serve");
    assert!(text.ends_with("unknown key `qqq`"), "{text}");
    let (text, _) = refused("lease = 1\n", "serve");
    assert!(text.contains("put it under [other]"), "{text}");
    let (text, _) = refused("[sevre]\nmodel = \"m\"\n", "serve");
    assert!(text.contains("did you mean `serve`?"), "{text}");
    // Tables of other commands are checked all the same.
    let (text, _) = refused("[other]\nleese = 1\n", "serve");
    assert!(
        text.contains("unknown key `other.leese`; did you mean `lease`?"),
        "{text}"
    );
    let (text, _) = refused("config = \"x\"\n", "serve");
    assert!(text.contains("unknown key `config`"), "{text}");
}

#[test]
fn a_wrong_value_is_named_with_where_it_came_from() {
    let (text, kind) = refused("model = \"m\"\nmax-running = -1\n", "serve");
    assert!(
        text.contains("--max-running") && text.contains("`-1`"),
        "{text}"
    );
    assert!(text.contains("key `max-running`"), "{text}");
    assert_eq!(kind, ExitKind::Config);
    let (text, _) = refused("model = \"m\"\ninsecure = 1\n", "serve");
    assert!(
        text.contains("--insecure: true or false is expected"),
        "{text}"
    );
    let (text, _) = refused("model = 1979-05-27\n", "serve");
    assert!(text.contains("--model"), "{text}");
    let (text, _) = refused("model = [\n", "serve");
    assert!(text.contains("configuration file"), "{text}");

    let error = load("serve --model m", &[("GUILD_MAX_RUNNING", "many")]).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("environment variable GUILD_MAX_RUNNING"),
        "{error}"
    );
    assert_eq!(error.exit_kind(), ExitKind::Config);
    // Typed on the command line it is clap's business, whatever the layers say.
    let error = load(
        "serve --model m --max-running x",
        &[("GUILD_MAX_RUNNING", "7")],
    )
    .unwrap_err();
    assert!(matches!(error, ConfigError::CommandLine(_)));
    assert_eq!(error.exit_kind(), ExitKind::Usage);
}

#[test]
fn a_missing_file_and_a_missing_flag_are_errors_and_help_is_not() {
    let error = load("serve --model m --config /nowhere/x.toml", &[]).unwrap_err();
    assert!(error.to_string().contains("/nowhere/x.toml"), "{error}");
    assert_eq!(error.exit_kind(), ExitKind::Config);
    let error = load("serve", &[]).unwrap_err();
    assert!(error.to_string().contains("--model"), "{error}");
    match load("serve --help", &[]).unwrap_err() {
        ConfigError::CommandLine(help) => assert!(!help.use_stderr()),
        other => panic!("{other}"),
    }
}
