//! `guild bench serve` against a real server: what it offers, what it says, and in whose words.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;

use guild_tests::process::{Cluster, LOOPBACK, demo, guild};
use serde_json::{Map, Value, json};

const PROMPTS: usize = 24;
const INPUT: usize = 20;
const OUTPUT: usize = 12;

/// Fields of a result with their types, as `vllm bench serve` writes them: `n` a number, `s` a
/// text, `?` either that or null.
const FIELDS: [(&str, &str); 21] = [
    ("date", "s"),
    ("endpoint_type", "s"),
    ("backend", "s"),
    ("label", "s?"),
    ("model_id", "s"),
    ("tokenizer_id", "s?"),
    ("num_prompts", "n"),
    ("request_rate", "ns"),
    ("burstiness", "n"),
    ("max_concurrency", "n?"),
    ("duration", "n"),
    ("completed", "n"),
    ("failed", "n"),
    ("total_input_tokens", "n"),
    ("total_output_tokens", "n"),
    ("request_throughput", "n"),
    ("request_goodput", "n?"),
    ("output_throughput", "n"),
    ("total_token_throughput", "n"),
    ("max_output_tokens_per_s", "n"),
    ("max_concurrent_requests", "n"),
];
/// Fields of single requests: lists of numbers, of texts, of lists.
const DETAILS: [(&str, &str); 9] = [
    ("input_lens", "n"),
    ("output_lens", "n"),
    ("ttfts", "n"),
    ("itls", "l"),
    ("latencies", "n"),
    ("start_times", "n"),
    ("queue_times", "n"),
    ("generated_texts", "s"),
    ("errors", "s"),
];

fn is(value: &Value, types: &str) -> bool {
    types.contains(match value {
        Value::Number(_) => 'n',
        Value::String(_) => 's',
        Value::Array(_) => 'l',
        Value::Null => '?',
        _ => ' ',
    })
}

/// Holds a result to the schema; nothing may be missing and nothing be added.
fn check(result: &Map<String, Value>, percentiles: &[&str], detailed: bool) {
    let mut known = Vec::new();
    for (name, types) in FIELDS {
        assert!(is(&result[name], types), "{name}: {}", result[name]);
        known.push(name.to_owned());
    }
    for family in ["ttft", "tpot", "itl", "e2el"] {
        let kinds = ["mean", "median", "std"].iter().chain(percentiles);
        for name in kinds.map(|kind| format!("{kind}_{family}_ms")) {
            assert!(result[&name].as_f64().is_some_and(|ms| ms >= 0.0), "{name}");
            known.push(name);
        }
    }
    for (name, types) in DETAILS.iter().filter(|_| detailed) {
        let list = result[*name].as_array().unwrap();
        let count = result["num_prompts"].as_u64().unwrap() as usize;
        assert_eq!(list.len(), count, "{name}");
        assert!(list.iter().all(|value| is(value, types)), "{name}");
        known.push((*name).to_owned());
    }
    let odd: Vec<_> = result.keys().filter(|name| !known.contains(name)).collect();
    assert!(odd.is_empty(), "{odd:?}");
}

fn bench(http: &str, flags: &str) -> (i32, String, String) {
    let endpoint = format!("http://{http}");
    let mut args = vec!["bench", "serve", "--endpoint", &endpoint];
    args.extend(flags.split_whitespace());
    guild(&args)
}

fn result(path: &std::path::Path) -> Map<String, Value> {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_counts_what_was_asked_and_has_the_names_that_others_read() {
    let cluster = Cluster::up(&demo());
    let dir = tempfile::tempdir().unwrap();
    let (out, html) = (dir.path().join("a.json"), dir.path().join("a.html"));

    let lengths = format!("--num-prompts {PROMPTS} --input-len {INPUT} --output-len {OUTPUT}");
    let files = format!("--out {} --html {}", out.display(), html.display());
    let (code, stdout, stderr) = bench(
        &cluster.http,
        &format!(
            "{lengths} {files} --max-concurrency 6 --save-detailed --goodput ttft:60000,tpot:60000 --metric-percentiles 90,99.9"
        ),
    );
    assert_eq!(code, 0, "{stderr}");
    let all = result(&out);
    check(&all, &["p90", "p99.9"], true);
    let number = |name: &str| all[name].as_u64().unwrap() as usize;
    assert_eq!(
        (number("completed"), number("failed")),
        (PROMPTS, 0),
        "{stderr}"
    );
    assert_eq!(number("total_input_tokens"), PROMPTS * INPUT);
    assert_eq!(number("total_output_tokens"), PROMPTS * OUTPUT);
    assert!((1..=6).contains(&number("max_concurrent_requests")));
    assert_eq!(all["request_goodput"], all["request_throughput"]);
    assert_eq!(all["model_id"], "demo");
    let itls = all["itls"].as_array().unwrap();
    assert!(
        itls.iter()
            .all(|gaps| gaps.as_array().unwrap().len() < OUTPUT)
    );
    assert!(stdout.contains("Output token throughput"), "{stdout}");
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("<svg") && page.contains("Inter-token latency"));
    assert!(
        !page.contains("src=") && !page.contains("href="),
        "a page stands alone"
    );

    // The chat endpoint, with arrivals over time and prompts of text.
    let tokenizer = demo();
    let (code, stdout, stderr) = bench(
        &cluster.http,
        &format!(
            "--api chat --tokenizer {} --num-prompts 8 --input-len 10 --output-len 6 --request-rate 40 --burstiness 0.5 --json",
            tokenizer.display()
        ),
    );
    assert_eq!(code, 0, "{stderr}");
    let chat: Map<String, Value> = serde_json::from_str(&stdout).unwrap();
    check(&chat, &["p50", "p90", "p99"], false);
    assert_eq!(chat["completed"], 8);
    assert_eq!(chat["total_output_tokens"], 8 * 6);
    assert_eq!(chat["request_goodput"], Value::Null);

    // A result is as good as itself, and worse than one of twice the throughput.
    let path = out.to_str().unwrap();
    let (code, _, stderr) = guild(&["bench", "compare", path, path]);
    assert_eq!(code, 0, "{stderr}");
    let mut twice = all.clone();
    let throughput = all["output_throughput"].as_f64().unwrap();
    twice.insert("output_throughput".into(), (2.0 * throughput).into());
    let better = dir.path().join("b.json");
    std::fs::write(&better, Value::Object(twice).to_string()).unwrap();
    let (code, stdout, stderr) = guild(&["bench", "compare", better.to_str().unwrap(), path]);
    assert_eq!(code, 7, "{stdout}{stderr}");
    assert!(stderr.contains("output_throughput"), "{stderr}");
}

/// One connection to a server that streams as llama.cpp's `llama-server` does: no usage but in the last chunk, which
/// has no text, beside figures of its own. It takes what it does not know, and every token is a word of its text.
fn llama_server(mut stream: TcpStream, asked: &mpsc::Sender<Value>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        head.push_str(&line);
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let answer = |kind: &str| {
        format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
    };
    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
    if head.starts_with("GET /v1/models ") {
        let models =
            json!({"object": "list", "data": [{"id": "moonlight.gguf", "object": "model"}]});
        stream.write_all(answer("application/json").as_bytes())?;
        stream.write_all(chunk(&models.to_string()).as_bytes())?;
        return stream.write_all(b"0\r\n\r\n");
    }
    let body: Value = serde_json::from_slice(&body).unwrap();
    let tokens = body["max_tokens"].as_u64().unwrap();
    let prompt = match &body["prompt"] {
        Value::Array(ids) => ids.len(),
        text => text.as_str().unwrap().split_whitespace().count(),
    };
    asked.send(body).unwrap();
    stream.write_all(answer("text/event-stream").as_bytes())?;
    let base = json!({"object": "text_completion", "model": "moonlight.gguf", "id": "chatcmpl-1"});
    for n in 0..=tokens {
        let mut event = base.clone();
        let last = n == tokens;
        event["choices"] = json!([{
            "text": if last { "" } else { " word" }, "index": 0, "logprobs": null,
            "finish_reason": last.then_some("length"),
        }]);
        if last {
            event["usage"] = json!({"completion_tokens": tokens, "prompt_tokens": prompt,
                "total_tokens": tokens as usize + prompt});
            event["timings"] = json!({"prompt_n": prompt, "predicted_n": tokens});
        }
        stream.write_all(chunk(&format!("data: {event}\n\n")).as_bytes())?;
    }
    stream.write_all(chunk("data: [DONE]\n\n").as_bytes())?;
    stream.write_all(b"0\r\n\r\n")
}

#[test]
fn a_peer_that_streams_otherwise_is_measured_by_the_same_words() {
    let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (asks, asked) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let asks = asks.clone();
            // A client may leave as it likes.
            std::thread::spawn(move || llama_server(stream, &asks));
        }
    });
    let lengths = format!("--num-prompts {PROMPTS} --input-len {INPUT} --output-len {OUTPUT}");
    let load = "--max-concurrency 4 --goodput ttft:60000,tpot:60000 --json";
    let tokenizer = demo();
    let text = format!("--tokenizer {}", tokenizer.display());
    for (prompts, extra) in [
        ("", ""),
        ("", r#"--extra-body {"cache_prompt":false}"#),
        (&text, ""),
    ] {
        let (code, stdout, stderr) =
            bench(&address, &format!("{lengths} {load} {prompts} {extra}"));
        assert_eq!(code, 0, "{stderr}");
        let all: Map<String, Value> = serde_json::from_str(&stdout).unwrap();
        check(&all, &["p50", "p90", "p99"], false);
        assert_eq!(
            (&all["completed"], &all["failed"]),
            (&PROMPTS.into(), &0.into())
        );
        assert_eq!(all["model_id"], "moonlight.gguf");
        assert_eq!(all["total_output_tokens"], PROMPTS * OUTPUT);
        assert_eq!(all["request_goodput"], all["request_throughput"]);
        let bodies: Vec<Value> = asked.try_iter().collect();
        // One goes before the measured ones.
        assert_eq!(bodies.len(), PROMPTS + 1);
        for body in bodies {
            assert_eq!(body["ignore_eos"], true);
            assert_eq!(body["prompt"].is_string(), !prompts.is_empty());
            assert_eq!(body["cache_prompt"].is_boolean(), !extra.is_empty());
        }
        if prompts.is_empty() {
            assert_eq!(all["total_input_tokens"], PROMPTS * INPUT);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_measured_is_said() {
    let cluster = Cluster::up(&demo());
    for (flags, code, says) in [
        (
            "--num-prompts 1 --input-len 100000",
            5,
            "the first request failed",
        ),
        ("--model nobody --num-prompts 1", 5, "nobody"),
        ("--dataset trace --num-prompts 1", 2, "--dataset-path"),
        (
            "--dataset sharegpt --dataset-path /dev/null --num-prompts 1",
            2,
            "--tokenizer",
        ),
        ("--goodput ttft --num-prompts 1", 2, "ttft:MS"),
        ("--extra-body [] --num-prompts 1", 2, "--extra-body"),
    ] {
        let (got, _, stderr) = bench(&cluster.http, flags);
        assert_eq!(got, code, "{flags}: {stderr}");
        assert!(stderr.contains(says), "{flags}: {stderr}");
    }
    let (code, _, stderr) = bench("127.0.0.1:9", "--num-prompts 1");
    assert_eq!(code, 5, "{stderr}");
}
