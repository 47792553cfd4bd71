//! What is asked: prompts and how long their answers are to be.
//!
//! Secret: how prompts are made. No two are alike unless they are meant to
//! share a prefix: a server with a prefix cache would otherwise be measured at
//! answering nothing.

use std::path::Path;
use std::sync::Arc;

use guild_model::Config;
use guild_model::text::Text;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::Deserialize;

use crate::args::{Api, BenchServe, Dataset};
use crate::failure::Failure;

/// Ids below this are often special tokens.
const FIRST_ID: u32 = 16;
/// Tokens of one block of a trace: what one of its hashes stands for.
const BLOCK: usize = 512;
/// Bytes of a dataset file, at most.
const MAX_FILE: u64 = 4 << 30;
/// Lengths that are kept of a ShareGPT file, as others prune it: shortest prompt and answer,
/// longest prompt, longest of both together.
const PRUNE: (usize, usize, usize) = (4, 1024, 2048);
/// How often a random text is mended until it has the right number of tokens.
const MENDS: usize = 8;

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) prompt: Prompt,
    /// Tokens of the prompt, as far as is known here.
    pub(super) prompt_len: usize,
    /// Tokens of the answer.
    pub(super) output_len: u32,
    /// Seconds from the start, where the dataset says.
    pub(super) at: Option<f64>,
}

/// What a server is asked.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompt {
    Ids(Vec<u32>),
    Text(String),
}

/// Makes requests as the flags say.
pub(super) struct Maker<'a> {
    args: &'a BenchServe,
    text: Option<Arc<Text>>,
}

fn tokenizer(dir: &Path) -> Result<Arc<Text>, Failure> {
    let config = Config::from_dir(dir)?;
    Text::load(dir, &config)?
        .ok_or_else(|| Failure::usage(format!("--tokenizer: {} has no tokenizer", dir.display())))
}

fn read(args: &BenchServe) -> Result<String, Failure> {
    let Some(path) = &args.dataset_path else {
        return Err(Failure::usage(
            "--dataset-path is missing: this dataset is a file",
        ));
    };
    let wrong = |why: String| Failure::usage(format!("--dataset-path: {}: {why}", path.display()));
    let size = std::fs::metadata(path)
        .map_err(|error| wrong(error.to_string()))?
        .len();
    if size > MAX_FILE {
        return Err(wrong(format!("larger than {MAX_FILE} bytes")));
    }
    std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))
}

/// One conversation of a ShareGPT file.
#[derive(Deserialize)]
struct Conversation {
    #[serde(default)]
    conversations: Vec<Turn>,
}

#[derive(Deserialize)]
struct Turn {
    value: String,
}

/// One line of a trace.
#[derive(Deserialize)]
struct Arrival {
    /// Milliseconds.
    timestamp: f64,
    input_length: usize,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

impl<'a> Maker<'a> {
    /// Loads the tokenizer, if there is to be one.
    pub(super) fn new(args: &'a BenchServe) -> Result<Maker<'a>, Failure> {
        let text = args.tokenizer.as_deref().map(tokenizer).transpose()?;
        if text.is_none() && args.api == Api::Chat && args.dataset != Dataset::ShareGpt {
            return Err(
                Failure::usage("--tokenizer is missing: messages of a chat are text")
                    .hint("give a checkpoint's folder, or leave --api chat out"),
            );
        }
        Ok(Maker { args, text })
    }

    /// The requests of a run, as many as were asked for and no two of them alike.
    pub(super) fn samples(&self) -> Result<Vec<Sample>, Failure> {
        let args = self.args;
        let mut rng = StdRng::seed_from_u64(args.seed);
        let n = args.num_prompts as usize;
        match args.dataset {
            Dataset::Random => (0..n).map(|_| self.random(&mut rng, &[])).collect(),
            Dataset::SharedPrefix => {
                let prefixes: Vec<Vec<u32>> = (0..args.num_prefixes)
                    .map(|_| self.ids(&mut rng, args.prefix_len as usize))
                    .collect();
                (0..n)
                    .map(|i| self.random(&mut rng, &prefixes[i % prefixes.len()]))
                    .collect()
            }
            Dataset::ShareGpt => self.sharegpt(&mut rng, &read(args)?, n),
            Dataset::Trace => self.trace(&read(args)?, n),
        }
    }

    /// Random requests to begin with, which none of the run is like.
    pub(super) fn warmups(&self) -> Result<Vec<Sample>, Failure> {
        let mut rng = StdRng::seed_from_u64(!self.args.seed);
        (0..self.args.num_warmups)
            .map(|_| self.random(&mut rng, &[]))
            .collect()
    }

    fn ids(&self, rng: &mut StdRng, n: usize) -> Vec<u32> {
        (0..n)
            .map(|_| rng.random_range(FIRST_ID..self.args.vocab_size))
            .collect()
    }

    /// A length around `mean`, by --range-ratio.
    fn length(&self, rng: &mut StdRng, mean: u32) -> u32 {
        let spread = (f64::from(mean) * self.args.range_ratio).floor() as u32;
        rng.random_range(mean - spread..=mean + spread).max(1)
    }

    fn random(&self, rng: &mut StdRng, prefix: &[u32]) -> Result<Sample, Failure> {
        let input = self.length(rng, self.args.input_len) as usize;
        let output_len = self.length(rng, self.args.output_len.unwrap_or(128));
        let mut ids = prefix.to_vec();
        ids.extend(self.ids(rng, input));
        self.sample(ids, output_len, None, rng)
    }

    /// The request for these tokens: as they are, or as text of as many tokens.
    fn sample(
        &self,
        ids: Vec<u32>,
        output_len: u32,
        at: Option<f64>,
        rng: &mut StdRng,
    ) -> Result<Sample, Failure> {
        let (prompt, prompt_len) = match &self.text {
            None => {
                let n = ids.len();
                (Prompt::Ids(ids), n)
            }
            Some(text) => {
                let (text, n) = self.written(text, ids, rng)?;
                (Prompt::Text(text), n)
            }
        };
        Ok(Sample {
            prompt,
            prompt_len,
            output_len,
            at,
        })
    }

    /// A text that begins like `ids` and has as many tokens, or nearly so: what tokens spell out
    /// is not always read as the same tokens.
    fn written(
        &self,
        text: &Text,
        mut ids: Vec<u32>,
        rng: &mut StdRng,
    ) -> Result<(String, usize), Failure> {
        let wanted = ids.len();
        let mut words = text.decode(&ids, true)?;
        for _ in 0..MENDS {
            ids = text.encode_plain(&words)?;
            if ids.len() == wanted {
                break;
            }
            ids.truncate(wanted);
            let more = self.ids(rng, wanted - ids.len());
            ids.extend(more);
            words = text.decode(&ids, true)?;
        }
        let n = text.encode_plain(&words)?.len();
        Ok((words, n))
    }

    fn sharegpt(&self, rng: &mut StdRng, file: &str, n: usize) -> Result<Vec<Sample>, Failure> {
        let Some(text) = &self.text else {
            return Err(Failure::usage(
                "--tokenizer is missing: it says how long the conversations are",
            ));
        };
        let mut all: Vec<Conversation> = serde_json::from_str(file).map_err(|error| {
            Failure::usage(format!("--dataset-path: no ShareGPT JSON: {error}"))
        })?;
        all.retain(|conversation| conversation.conversations.len() >= 2);
        // Any part of the file, in any order, but the same for one seed.
        for i in (1..all.len()).rev() {
            all.swap(i, rng.random_range(0..=i));
        }
        let (shortest, longest_prompt, longest) = PRUNE;
        let mut samples = Vec::with_capacity(n);
        for conversation in all {
            let [prompt, answer] = [0, 1].map(|i| &conversation.conversations[i].value);
            let prompt_len = text.encode_plain(prompt)?.len();
            let answer_len = text.encode_plain(answer)?.len();
            let output = self.args.output_len.map_or(answer_len, |n| n as usize);
            if prompt_len < shortest
                || answer_len < shortest
                || prompt_len > longest_prompt
                || prompt_len + output > longest
            {
                continue;
            }
            samples.push(Sample {
                prompt: Prompt::Text(prompt.clone()),
                prompt_len,
                output_len: output as u32,
                at: None,
            });
            if samples.len() == n {
                return Ok(samples);
            }
        }
        Err(enough(samples.len(), n, "conversations of a usable length"))
    }

    fn trace(&self, file: &str, n: usize) -> Result<Vec<Sample>, Failure> {
        let mut samples = Vec::with_capacity(n);
        for (line, text) in (1..)
            .zip(file.lines())
            .filter(|(_, text)| !text.trim().is_empty())
        {
            let arrival: Arrival = serde_json::from_str(text)
                .map_err(|error| Failure::usage(format!("--dataset-path: line {line}: {error}")))?;
            let sensible = arrival.timestamp.is_finite()
                && arrival.timestamp >= 0.0
                && (1..=10_000_000).contains(&arrival.input_length)
                && arrival.output_length >= 1;
            if !sensible {
                return Err(Failure::usage(format!(
                    "--dataset-path: line {line}: timestamp, input_length or output_length is out of range"
                )));
            }
            let seed = |number: u64| StdRng::seed_from_u64(self.args.seed ^ number.rotate_left(17));
            let mut ids = Vec::with_capacity(arrival.input_length);
            for &hash in &arrival.hash_ids {
                ids.extend(self.ids(&mut seed(hash), BLOCK));
            }
            // What the hashes do not cover is this request's own.
            let mut own = seed(u64::MAX - line);
            ids.truncate(arrival.input_length);
            let rest = self.ids(&mut own, arrival.input_length - ids.len());
            ids.extend(rest);
            let output = self.args.output_len.unwrap_or(arrival.output_length);
            let at = Some(arrival.timestamp / 1000.0);
            samples.push(self.sample(ids, output, at, &mut own)?);
            if samples.len() == n {
                break;
            }
        }
        if samples.len() < n {
            return Err(enough(samples.len(), n, "requests"));
        }
        // A trace may begin at any time of its day.
        let first = samples
            .iter()
            .filter_map(|s| s.at)
            .fold(f64::INFINITY, f64::min);
        for sample in &mut samples {
            sample.at = sample.at.map(|at| at - first);
        }
        Ok(samples)
    }
}

fn enough(found: usize, wanted: usize, what: &str) -> Failure {
    Failure::usage(format!(
        "--dataset-path: {found} {what}, --num-prompts asks for {wanted}"
    ))
    .hint(format!("give --num-prompts {found} or a longer file"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashSet;

    use clap::Parser as _;

    use super::*;
    use crate::args::{BenchCommand, Cli, Command};

    fn args(flags: &str) -> BenchServe {
        let line = format!("guild bench serve {flags}");
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Bench(bench) = cli.command else {
            unreachable!()
        };
        let BenchCommand::Serve(args) = bench.command else {
            unreachable!()
        };
        *args
    }

    fn samples(args: &BenchServe) -> Result<Vec<Sample>, Failure> {
        Maker::new(args)?.samples()
    }

    fn ids(sample: &Sample) -> Vec<u32> {
        match &sample.prompt {
            Prompt::Ids(ids) => ids.clone(),
            Prompt::Text(text) => panic!("{text}"),
        }
    }

    #[test]
    fn random_prompts_have_the_lengths_asked_for_and_none_comes_twice() {
        let args = args("--num-prompts 200 --input-len 100 --output-len 10 --range-ratio 0.2");
        let samples = samples(&args).unwrap();
        let distinct: HashSet<_> = samples.iter().map(ids).collect();
        assert_eq!(distinct.len(), 200);
        assert!(samples.iter().all(|s| (80..=120).contains(&s.prompt_len)));
        assert!(samples.iter().all(|s| (8..=12).contains(&s.output_len)));
        assert!(samples.iter().any(|s| s.prompt_len != 100));
        assert!(
            samples
                .iter()
                .flat_map(ids)
                .all(|id| (16..1000).contains(&id))
        );
        assert_eq!(samples, self::samples(&args).unwrap());
        let warm: HashSet<_> = Maker::new(&args)
            .unwrap()
            .warmups()
            .unwrap()
            .iter()
            .map(ids)
            .collect();
        assert!(distinct.is_disjoint(&warm));
    }

    #[test]
    fn shared_prefixes_are_shared_and_what_follows_is_not() {
        let args = args(
            "--dataset shared-prefix --num-prompts 12 --prefix-len 50 --num-prefixes 3 --input-len 20",
        );
        let samples: Vec<_> = samples(&args).unwrap().iter().map(ids).collect();
        let prefixes: HashSet<_> = samples.iter().map(|s| s[..50].to_vec()).collect();
        let rests: HashSet<_> = samples.iter().map(|s| s[50..].to_vec()).collect();
        assert_eq!((prefixes.len(), rests.len()), (3, 12));
    }

    #[test]
    fn a_trace_shares_the_blocks_of_equal_hashes_and_keeps_its_times() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.jsonl");
        let lines = [
            r#"{"timestamp": 5000, "input_length": 600, "output_length": 7, "hash_ids": [1, 2]}"#,
            r#"{"timestamp": 6500, "input_length": 700, "output_length": 8, "hash_ids": [1, 3]}"#,
            r#"{"timestamp": 9000, "input_length": 40, "output_length": 9}"#,
        ];
        std::fs::write(&path, lines.join("\n")).unwrap();
        let flags = format!(
            "--dataset trace --dataset-path {} --num-prompts 3",
            path.display()
        );
        let trace = samples(&args(&flags)).unwrap();
        let at: Vec<_> = trace.iter().map(|s| s.at).collect();
        assert_eq!(at, [Some(0.0), Some(1.5), Some(4.0)]);
        let lengths: Vec<_> = trace.iter().map(|s| (s.prompt_len, s.output_len)).collect();
        assert_eq!(lengths, [(600, 7), (700, 8), (40, 9)]);
        assert_eq!(ids(&trace[0])[..512], ids(&trace[1])[..512]);
        assert_ne!(ids(&trace[0])[512..600], ids(&trace[1])[512..600]);

        let more = format!("{flags}0");
        let refused = samples(&args(&more)).unwrap_err();
        assert!(
            refused.message().contains("3 requests"),
            "{}",
            refused.message()
        );
        std::fs::write(
            &path,
            "{\"timestamp\": -1, \"input_length\": 1, \"output_length\": 1}",
        )
        .unwrap();
        let refused = samples(&args(&flags)).unwrap_err();
        assert!(
            refused.message().contains("line 1"),
            "{}",
            refused.message()
        );
    }

    #[test]
    fn text_has_the_length_asked_for() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo");
        let flags = format!("--api chat --tokenizer {demo} --num-prompts 20 --input-len 40");
        let samples = samples(&args(&flags)).unwrap();
        let near = samples
            .iter()
            .filter(|s| s.prompt_len.abs_diff(40) <= 4)
            .count();
        assert!(near >= 18, "{near}");
        assert!(self::samples(&args("--api chat")).is_err());
    }

    #[test]
    fn sharegpt_keeps_conversations_of_a_usable_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sharegpt.json");
        let turn = |text: &str| serde_json::json!({"from": "human", "value": text});
        let talk = |ask: &str, answer: &str| serde_json::json!({"conversations": [turn(ask), turn(answer)]});
        let long = "what is the weather like today ".repeat(400);
        let all = serde_json::json!([
            talk("tell me of the sea and its ships", "the sea is wide and the ships are small"),
            talk("a", "too short to be of any use here"),
            talk(&long, "that was a long question, was it not"),
            {"conversations": [turn("nobody answers this one here")]},
        ]);
        std::fs::write(&path, all.to_string()).unwrap();
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo");
        let flags = format!(
            "--dataset sharegpt --dataset-path {} --tokenizer {demo} --num-prompts 1",
            path.display()
        );
        let samples = samples(&args(&flags)).unwrap();
        let asked = Prompt::Text("tell me of the sea and its ships".into());
        assert_eq!(samples[0].prompt, asked);
        assert!(self::samples(&args(&flags.replace("prompts 1", "prompts 2"))).is_err());
    }
}
