//! Configuration in four layers: a flag typed on the command line wins over
//! the environment, that over the file named by `--config`, that over the
//! default written beside the flag.
//!
//! The flags of a command are declared once, as a clap structure; the other
//! layers follow from it. `--max-running` is `GUILD_MAX_RUNNING` in the
//! environment and `max-running` in the file. A file may have one table per
//! subcommand (`[expert-node]`); keys outside of tables apply to whatever
//! command reads the file. A key that no flag answers to is refused.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::builder::OsStr;
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, ArgMatches, Command, Parser};

use crate::exit::{ExitKind, HasExitKind};

/// Name of the flag that names the file.
const FILE_FLAG: &str = "config";
/// What the environment twin of every flag begins with.
pub const ENV_PREFIX: &str = "GUILD_";
/// A name further away than this from every flag gets no hint.
const HINT_SIMILARITY: f64 = 0.7;
/// Bytes of a configuration file, at most.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Where the value of a flag came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Typed on the command line.
    CommandLine,
    /// An environment variable.
    Environment(String),
    /// A key of the configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The key, with its table.
        key: String,
    },
    /// Nobody said anything.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::CommandLine => write!(f, "the command line"),
            Origin::Environment(name) => write!(f, "environment variable {name}"),
            Origin::File { path, key } => write!(f, "{}, key `{key}`", path.display()),
            Origin::Default => write!(f, "the default"),
        }
    }
}

/// The origin of every flag of the command that was run, by long name.
#[derive(Clone, Debug, Default)]
pub struct Origins(BTreeMap<String, Origin>);

impl Origins {
    /// Where the value of `--flag` came from (name without dashes).
    pub fn of(&self, flag: &str) -> &Origin {
        self.0.get(flag).unwrap_or(&Origin::Default)
    }
}

/// A parsed command line with the layers below it applied.
#[derive(Clone, Debug)]
pub struct Loaded<T> {
    /// The values.
    pub value: T,
    /// Where they came from.
    pub origins: Origins,
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The command line is wrong, or asked for help or the version. clap
    /// renders it.
    #[error("{0}")]
    CommandLine(clap::Error),
    /// A value from the environment or the file is wrong.
    #[error("--{flag}: {message} (the value comes from {origin})")]
    Value {
        /// The flag that the value is for.
        flag: String,
        /// What is wrong with it.
        message: String,
        /// Where it came from.
        origin: Origin,
    },
    /// The file cannot be read, or is not TOML.
    #[error("configuration file {path}: {message}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The file has a key that no flag answers to.
    #[error("configuration file {path}: unknown key `{key}`{hint}")]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What may have been meant; empty when nothing is near.
        hint: String,
    },
}

impl HasExitKind for ConfigError {
    fn exit_kind(&self) -> ExitKind {
        match self {
            ConfigError::CommandLine(_) => ExitKind::Usage,
            _ => ExitKind::Config,
        }
    }
}

/// Parses this process's command line with its environment.
///
/// # Errors
/// As [`load_from`]; a request for help or the version is a
/// [`ConfigError::CommandLine`] whose clap error says so
/// ([`clap::Error::use_stderr`] is false).
pub fn load<T: Parser>() -> Result<Loaded<T>, ConfigError> {
    load_from(std::env::args_os(), &|name| std::env::var_os(name))
}

/// Parses `args` (the first is the name of the program) over `env`.
///
/// # Errors
/// The first thing that is wrong, named with where it came from.
pub fn load_from<T: Parser>(
    args: impl IntoIterator<Item = OsString>,
    env: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Loaded<T>, ConfigError> {
    let args: Vec<OsString> = args.into_iter().collect();
    let mut command = T::command();
    // Adds --help and makes global flags part of the subcommands.
    command.build();
    let path = subcommands(&command, &args);
    let target = walk(&command, &path);
    let flags = Flags::of(target);

    let mut layers = Layers::default();
    if let Some(file) = flags.get(FILE_FLAG).and_then(|_| file_named(&args, env)) {
        layers.read_file(&file, &command, &path, &flags)?;
    }
    layers.read_env(&flags, env)?;

    let mut origins = Origins::default();
    let layered = apply(T::command(), &path, &layers.values, &flags);
    let matches = layered
        .try_get_matches_from(&args)
        .map_err(|error| explain(error, &layers, &args))?;
    let leaf = leaf_matches(&matches, &path);
    for (name, flag) in &flags.0 {
        let origin = match leaf.value_source(&flag.id) {
            Some(clap::parser::ValueSource::CommandLine) => Origin::CommandLine,
            Some(_) => layers
                .values
                .get(name)
                .map_or(Origin::Default, |(_, origin)| origin.clone()),
            None => Origin::Default,
        };
        origins.0.insert(name.clone(), origin);
    }
    let value = T::from_arg_matches(&matches).map_err(ConfigError::CommandLine)?;
    Ok(Loaded { value, origins })
}

/// A flag as the layers see it.
struct Flag {
    id: String,
    boolean: bool,
}

/// The flags of one command by long name.
struct Flags(BTreeMap<String, Flag>);

impl Flags {
    fn of(command: &Command) -> Flags {
        let layered = |arg: &&Arg| {
            !matches!(
                arg.get_action(),
                ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
            )
        };
        Flags(
            command
                .get_arguments()
                .filter(layered)
                .filter_map(|arg| {
                    let flag = Flag {
                        id: arg.get_id().as_str().to_owned(),
                        boolean: matches!(
                            arg.get_action(),
                            ArgAction::SetTrue | ArgAction::SetFalse
                        ),
                    };
                    Some((arg.get_long()?.to_owned(), flag))
                })
                .collect(),
        )
    }

    fn get(&self, name: &str) -> Option<&Flag> {
        self.0.get(name)
    }
}

/// The values found below the command line, with their origins.
#[derive(Default)]
struct Layers {
    values: BTreeMap<String, (Vec<OsString>, Origin)>,
}

impl Layers {
    fn read_file(
        &mut self,
        path: &Path,
        command: &Command,
        chosen: &[String],
        flags: &Flags,
    ) -> Result<(), ConfigError> {
        let failed = |message: String| ConfigError::File {
            path: path.to_owned(),
            message,
        };
        let size = std::fs::metadata(path)
            .map_err(|e| failed(e.to_string()))?
            .len();
        if size > MAX_FILE_BYTES {
            return Err(failed(format!(
                "{size} bytes are too many for a configuration file (at most {MAX_FILE_BYTES})"
            )));
        }
        let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        let table: toml::Table = toml::from_str(&text).map_err(|e| failed(e.to_string()))?;

        // A command's own table wins over the keys outside of tables.
        let (tables, keys): (Vec<_>, Vec<_>) = table.iter().partition(|(_, v)| v.is_table());
        for (key, value) in keys {
            if flags.get(key).is_none() || key == FILE_FLAG {
                return Err(unknown_key(path, key, command, flags));
            }
            self.set_from_file(path, key, key, value, flags)?;
        }
        for (name, table) in tables {
            let Some(section) = command.find_subcommand(name) else {
                return Err(unknown_key(path, name, command, flags));
            };
            let section_flags = Flags::of(section);
            for (key, value) in table.as_table().into_iter().flatten() {
                if section_flags.get(key).is_none() || key == FILE_FLAG {
                    let mut error = unknown_key(path, key, section, &section_flags);
                    if let ConfigError::UnknownKey { key, .. } = &mut error {
                        *key = format!("{name}.{key}");
                    }
                    return Err(error);
                }
                if chosen.first() == Some(name) {
                    self.set_from_file(path, &format!("{name}.{key}"), key, value, flags)?;
                }
            }
        }
        Ok(())
    }

    fn set_from_file(
        &mut self,
        path: &Path,
        shown: &str,
        key: &str,
        value: &toml::Value,
        flags: &Flags,
    ) -> Result<(), ConfigError> {
        let origin = Origin::File {
            path: path.to_owned(),
            key: shown.to_owned(),
        };
        let wrong = |message: &str| ConfigError::Value {
            flag: key.to_owned(),
            message: message.to_owned(),
            origin: origin.clone(),
        };
        if flags.get(key).is_some_and(|f| f.boolean) && !value.is_bool() {
            return Err(wrong("true or false is expected"));
        }
        let scalar = |value: &toml::Value| match value {
            toml::Value::String(s) => Ok(OsString::from(s)),
            toml::Value::Integer(i) => Ok(OsString::from(i.to_string())),
            toml::Value::Float(x) => Ok(OsString::from(x.to_string())),
            toml::Value::Boolean(b) => Ok(OsString::from(b.to_string())),
            _ => Err(wrong("a string, a number, true or false is expected")),
        };
        let values = match value {
            toml::Value::Array(items) => items.iter().map(scalar).collect::<Result<_, _>>()?,
            value => vec![scalar(value)?],
        };
        self.values.insert(key.to_owned(), (values, origin));
        Ok(())
    }

    fn read_env(
        &mut self,
        flags: &Flags,
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<(), ConfigError> {
        for (name, flag) in &flags.0 {
            let variable = env_name(name);
            // Set but empty is how container manifests say "not set".
            let Some(mut value) = env(&variable).filter(|v| !v.is_empty()) else {
                continue;
            };
            let origin = Origin::Environment(variable);
            if flag.boolean {
                let text = value.to_string_lossy().to_lowercase();
                value = match text.as_str() {
                    "1" | "true" | "yes" | "on" => "true".into(),
                    "0" | "false" | "no" | "off" => "false".into(),
                    _ => {
                        return Err(ConfigError::Value {
                            flag: name.clone(),
                            message: format!("`{text}` is neither true nor false"),
                            origin,
                        });
                    }
                };
            }
            self.values.insert(name.clone(), (vec![value], origin));
        }
        Ok(())
    }
}

/// The environment twin of a flag.
pub fn env_name(flag: &str) -> String {
    format!("{ENV_PREFIX}{}", flag.replace('-', "_").to_uppercase())
}

/// The subcommands that `args` names, outermost first, without judging the rest.
fn subcommands(command: &Command, args: &[OsString]) -> Vec<String> {
    let mut path = Vec::new();
    let mut at = command;
    for arg in args.iter().skip(1) {
        let Some(sub) = arg.to_str().and_then(|name| at.find_subcommand(name)) else {
            continue;
        };
        path.push(sub.get_name().to_owned());
        at = sub;
    }
    path
}

fn walk<'a>(command: &'a Command, path: &[String]) -> &'a Command {
    path.iter()
        .fold(command, |at, name| at.find_subcommand(name).unwrap_or(at))
}

fn leaf_matches<'a>(matches: &'a ArgMatches, path: &[String]) -> &'a ArgMatches {
    path.iter().fold(matches, |at, name| {
        at.subcommand_matches(name).unwrap_or(at)
    })
}

/// The configuration file that the command line or else the environment names.
fn file_named(args: &[OsString], env: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let flag = format!("--{FILE_FLAG}");
    let prefix = format!("{flag}=");
    let mut named = None;
    let mut rest = args.iter().skip(1).take_while(|arg| *arg != "--");
    while let Some(arg) = rest.next() {
        if *arg == *flag {
            named = rest.next().map(PathBuf::from);
        } else if let Some(value) = arg.to_str().and_then(|arg| arg.strip_prefix(&prefix)) {
            named = Some(PathBuf::from(value));
        }
    }
    named.or_else(|| {
        env(&env_name(FILE_FLAG))
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    })
}

/// Puts the layers under the command line: clap prefers a typed flag over a
/// default, so a value from below becomes the default of its flag.
fn apply(
    command: Command,
    path: &[String],
    values: &BTreeMap<String, (Vec<OsString>, Origin)>,
    flags: &Flags,
) -> Command {
    if let Some((name, rest)) = path.split_first() {
        // Global flags live in the outermost command and are passed down.
        let command = set_defaults(command, values, flags);
        return command.mut_subcommand(name, |sub| apply(sub, rest, values, flags));
    }
    set_defaults(command, values, flags)
}

fn set_defaults(
    mut command: Command,
    values: &BTreeMap<String, (Vec<OsString>, Origin)>,
    flags: &Flags,
) -> Command {
    for (name, (values, _)) in values {
        let Some(flag) = flags.get(name) else {
            continue;
        };
        let here = command
            .get_arguments()
            .any(|arg| arg.get_id().as_str() == flag.id && arg.get_long() == Some(name));
        if here {
            let values: Vec<OsStr> = values.iter().map(|v| OsStr::from(v.clone())).collect();
            command = command.mut_arg(flag.id.clone(), |arg| {
                arg.required(false).default_values(values)
            });
        }
    }
    command
}

fn unknown_key(path: &Path, key: &str, command: &Command, flags: &Flags) -> ConfigError {
    let elsewhere = command
        .get_subcommands()
        .find(|sub| Flags::of(sub).get(key).is_some())
        .map(|sub| {
            format!(
                ": this command has no such flag; put it under [{}]",
                sub.get_name()
            )
        });
    let names = flags
        .0
        .keys()
        .map(String::as_str)
        .chain(command.get_subcommands().map(Command::get_name))
        .filter(|name| *name != FILE_FLAG && *name != "help");
    let nearest = names
        .map(|name| (strsim::jaro_winkler(&key.replace('_', "-"), name), name))
        .filter(|(similarity, _)| *similarity >= HINT_SIMILARITY)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| format!("; did you mean `{name}`?"));
    ConfigError::UnknownKey {
        path: path.to_owned(),
        key: key.to_owned(),
        hint: elsewhere.or(nearest).unwrap_or_default(),
    }
}

/// clap does not know where a default came from; say so.
fn explain(error: clap::Error, layers: &Layers, args: &[OsString]) -> ConfigError {
    let flag = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(shown)) => shown
            .trim_start_matches("--")
            .split([' ', '='])
            .next()
            .unwrap_or_default()
            .to_owned(),
        _ => return ConfigError::CommandLine(error),
    };
    let typed = args.iter().filter_map(|arg| arg.to_str()).any(|arg| {
        arg.strip_prefix("--")
            .is_some_and(|arg| arg == flag || arg.starts_with(&format!("{flag}=")))
    });
    match layers.values.get(&flag) {
        Some((values, origin)) if !typed => {
            let shown: Vec<_> = values.iter().map(|v| v.to_string_lossy()).collect();
            let reason = std::error::Error::source(&error)
                .map_or_else(|| valid_values(&error), |source| format!(": {source}"));
            ConfigError::Value {
                flag,
                message: format!("`{}` is not valid{reason}", shown.join(",")),
                origin: origin.clone(),
            }
        }
        _ => ConfigError::CommandLine(error),
    }
}

fn valid_values(error: &clap::Error) -> String {
    match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(valid)) => format!(": possible values are {}", valid.join(", ")),
        _ => String::new(),
    }
}
