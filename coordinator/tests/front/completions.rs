//! POST /v1/completions.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::fake::{Step, door, door_with, logprobs_of};
use guild_coordinator::front::FrontLimits;

const PATH: &str = "/v1/completions";

fn streamed_text(chunks: &[Value]) -> String {
    chunks
        .iter()
        .flat_map(|c| c["choices"].as_array().unwrap())
        .map(|c| c["text"].as_str().unwrap())
        .collect()
}

#[tokio::test]
async fn text_comes_whole_and_in_pieces_alike() {
    let door = door();
    for (per_chunk, sample) in [
        (1, "What light through yonder window breaks?"),
        (3, "caf\u{e9} 🎉 世界"),
        (100, "one"),
    ] {
        let ids = door.will_say(sample, per_chunk);
        let whole = door
            .ok(
                PATH,
                json!({"model": "demo", "prompt": "ROMEO:", "max_tokens": 100}),
            )
            .await;
        assert_eq!(whole["choices"][0]["text"], sample);
        assert_eq!(whole["choices"][0]["finish_reason"], "length");
        assert_eq!(whole["object"], "text_completion");
        assert!(whole["id"].as_str().unwrap().starts_with("cmpl-"));
        let prompt = door.text.as_ref().unwrap().encode("ROMEO:").unwrap().len();
        assert_eq!(whole["usage"]["prompt_tokens"], prompt);
        assert_eq!(whole["usage"]["completion_tokens"], ids.len());
        assert_eq!(whole["usage"]["total_tokens"], prompt + ids.len());

        let body = json!({"model": "demo", "prompt": "ROMEO:", "max_tokens": 100, "stream": true, "stream_options": {"include_usage": true}});
        let answer = door.post(PATH, body).await;
        assert!(
            answer.headers["content-type"]
                .to_str()
                .unwrap()
                .starts_with("text/event-stream")
        );
        let mut chunks = answer.chunks();
        let last = chunks.pop().unwrap();
        assert_eq!(
            (&last["usage"], last["choices"].as_array().unwrap().len()),
            (&whole["usage"], 0)
        );
        assert_eq!(streamed_text(&chunks), sample);
        assert_eq!(
            chunks.last().unwrap()["choices"][0]["finish_reason"],
            "length"
        );
        let unfinished = &chunks[..chunks.len() - 1];
        assert!(
            unfinished
                .iter()
                .all(|c| c["choices"][0]["finish_reason"].is_null())
        );
    }
}

#[tokio::test]
async fn parameters_reach_the_cluster_and_have_openais_defaults() {
    let door = door();
    door.will_say("x", 1);
    door.ok(PATH, json!({"prompt": "a"})).await;
    let sampling = door.last_request().sampling.unwrap();
    assert_eq!(
        (
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k
        ),
        (Some(16), Some(1.0), Some(1.0), Some(0))
    );
    assert_eq!(
        (
            sampling.logprobs,
            sampling.prompt_logprobs,
            sampling.min_tokens
        ),
        (None, None, Some(0))
    );
    let drawn = sampling.seed;
    door.ok(
        PATH,
        json!({"prompt": "a", "user": "me", "metadata": {"a": "b"}, "store": false}),
    )
    .await;
    assert_ne!(
        door.last_request().sampling.unwrap().seed,
        drawn,
        "an unset seed is drawn for each request"
    );

    let body = json!({
        "prompt": "a", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": -1, "stop": "q", "stop_token_ids": [9], "ignore_eos": true,
        "min_tokens": 2, "logprobs": 3, "presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1.25, "min_p": 0.125,
        "logit_bias": {"7": -100, "8": 1.5}, "best_of": 1, "n": 1, "suffix": null,
        "echo": false, "stream": false,
    });
    door.ok(PATH, body).await;
    let s = door.last_request().sampling.unwrap();
    assert_eq!(
        (s.max_tokens, s.temperature, s.top_p, s.top_k, s.seed),
        (Some(7), Some(0.5), Some(0.9), Some(5), Some(u64::MAX))
    );
    assert_eq!(
        (s.stop_token_ids, s.ignore_eos, s.min_tokens, s.logprobs),
        (vec![9], true, Some(2), Some(3))
    );
    assert_eq!(
        (
            s.presence_penalty,
            s.frequency_penalty,
            s.repetition_penalty,
            s.min_p
        ),
        (Some(1.0), Some(-0.5), Some(1.25), Some(0.125))
    );
    assert_eq!(s.logit_bias, HashMap::from([(7, -100.0), (8, 1.5)]));
    door.ok(
        PATH,
        json!({"prompt": "a", "temperature": 0, "seed": 5, "top_k": -1}),
    )
    .await;
    let s = door.last_request().sampling.unwrap();
    assert_eq!(
        (s.temperature, s.seed, s.top_k),
        (Some(0.0), Some(0), Some(0))
    );
}

#[tokio::test]
async fn a_prompt_has_four_forms() {
    let door = door();
    door.will_say("yes", 1);
    let text = door.text.clone().unwrap();
    let (a, b) = (text.encode("one").unwrap(), text.encode("two two").unwrap());
    for (prompt, expected) in [
        (json!("one"), vec![a.clone()]),
        (json!(["one", "two two"]), vec![a.clone(), b.clone()]),
        (json!(a), vec![a.clone()]),
        (json!([a, b]), vec![a.clone(), b.clone()]),
        (json!(["one", b]), vec![a.clone(), b.clone()]),
    ] {
        door.fake.requests.lock().unwrap().clear();
        let answer = door
            .ok(PATH, json!({"prompt": prompt, "return_token_ids": true}))
            .await;
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(
            choices
                .iter()
                .map(|c| c["prompt_token_ids"].clone())
                .collect::<Vec<_>>(),
            expected.iter().map(|e| json!(e)).collect::<Vec<_>>()
        );
        assert_eq!(
            choices
                .iter()
                .map(|c| c["index"].as_u64().unwrap())
                .collect::<Vec<_>>(),
            (0..expected.len() as u64).collect::<Vec<_>>()
        );
        assert_eq!(
            answer["usage"]["prompt_tokens"],
            expected.iter().map(Vec::len).sum::<usize>()
        );
    }
}

#[tokio::test]
async fn choices_draw_by_their_own_seeds_and_the_prompt_counts_once() {
    let door = door();
    let ids = door.will_say("yes", 1);
    let prompt = door.text.as_ref().unwrap().encode("a b c").unwrap().len();
    for stream in [false, true] {
        door.fake.requests.lock().unwrap().clear();
        let body = json!({"prompt": ["a b c", "a b c"], "n": 3, "seed": 40, "stream": stream, "stream_options": stream.then(|| json!({"include_usage": true}))});
        let answer = door.post(PATH, body).await;
        let usage = if stream {
            answer.chunks().last().unwrap()["usage"].clone()
        } else {
            answer.json()["usage"].clone()
        };
        assert_eq!(
            (
                usage["prompt_tokens"].as_u64(),
                usage["completion_tokens"].as_u64()
            ),
            (Some(2 * prompt as u64), Some(6 * ids.len() as u64))
        );
        let requests = door.fake.requests.lock().unwrap().clone();
        let seeds: Vec<_> = requests
            .iter()
            .map(|r| r.sampling.as_ref().unwrap().seed.unwrap())
            .collect();
        assert_eq!(seeds, [40, 41, 42, 40, 41, 42]);
        let mut names: Vec<_> = requests.iter().map(|r| &r.request_id).collect();
        names.dedup();
        assert_eq!(names.len(), 6, "every request has a name of its own");
        if stream {
            let mut texts = vec![String::new(); 6];
            for chunk in answer.chunks() {
                for choice in chunk["choices"].as_array().unwrap() {
                    texts[choice["index"].as_u64().unwrap() as usize] +=
                        choice["text"].as_str().unwrap();
                }
            }
            assert_eq!(texts, vec!["yes"; 6]);
        }
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_it_wherever_chunks_are_cut() {
    let door = door();
    let sample = "To be, or not to be, that is the question";
    for per_chunk in [1, 2, 5, 100] {
        door.will_say(sample, per_chunk);
        door.fake.steps.lock().unwrap().push(Step::Hang);
        for (stop, expected) in [
            (json!(", that"), "To be, or not to be"),
            (json!(["zzz", "not", "no"]), "To be, or "),
            (json!("To"), ""),
            (json!(["t to b"]), "To be, or no"),
        ] {
            let body = json!({"prompt": "x", "max_tokens": 60, "stop": stop});
            let whole = door.ok(PATH, body.clone()).await;
            let choice = &whole["choices"][0];
            assert_eq!(
                (choice["text"].as_str(), choice["finish_reason"].as_str()),
                (Some(expected), Some("stop")),
                "{per_chunk} {stop}"
            );
            let matched = choice["matched_stop"].as_str().unwrap();
            assert!(sample[expected.len()..].starts_with(matched));
            let generated = whole["usage"]["completion_tokens"].as_u64().unwrap() as usize;
            let text = door.text.as_ref().unwrap();
            let covered = text
                .decode(&text.encode_plain(sample).unwrap()[..generated], true)
                .unwrap();
            assert!(
                covered.contains(matched) && covered.len() < expected.len() + matched.len() + 12,
                "tokens are counted up to the one that ended it"
            );
            assert_eq!(
                door.live(),
                0,
                "the cluster's stream is let go at the match"
            );

            let mut streaming = body;
            streaming["stream"] = true.into();
            let chunks = door.post(PATH, streaming).await.chunks();
            assert_eq!(streamed_text(&chunks), expected);
            assert_eq!(
                chunks.last().unwrap()["choices"][0]["finish_reason"],
                "stop"
            );
        }
    }
}

#[tokio::test]
async fn a_stop_string_that_does_not_come_loses_no_text() {
    let door = door();
    door.will_say("ends with a half st", 1);
    let whole = door
        .ok(
            PATH,
            json!({"prompt": "x", "max_tokens": 60, "stop": ["stop", "half stone"]}),
        )
        .await;
    assert_eq!(
        (
            whole["choices"][0]["text"].as_str(),
            whole["choices"][0]["finish_reason"].as_str()
        ),
        (Some("ends with a half st"), Some("length"))
    );
}

#[tokio::test]
async fn stop_strings_wait_for_min_tokens() {
    let door = door();
    let ids = door.will_say("aXbXcXd", 1);
    let whole = door
        .ok(
            PATH,
            json!({"prompt": "x", "max_tokens": 60, "stop": "X", "min_tokens": ids.len()}),
        )
        .await;
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["choices"][0]["text"], "aXbXcXd");
}

#[tokio::test]
async fn tokens_that_end_the_request_have_no_text() {
    let door = door();
    let text = door.text.clone().unwrap();
    let (hi, there) = (
        text.encode_plain("hi").unwrap(),
        text.encode_plain("~").unwrap(),
    );
    let eos = 1;
    for (steps, extra, expected, reason) in [
        (
            vec![Step::Tokens(hi.clone()), Step::Tokens(vec![eos])],
            json!({}),
            "hi",
            "stop",
        ),
        (
            vec![Step::Tokens([hi.clone(), vec![eos]].concat())],
            json!({}),
            "hi",
            "stop",
        ),
        (
            vec![Step::Tokens(hi.clone()), Step::Tokens(there.clone())],
            json!({"stop_token_ids": there}),
            "hi",
            "stop",
        ),
        (
            vec![Step::Tokens([hi.clone(), vec![eos], hi.clone()].concat())],
            json!({"ignore_eos": true}),
            "hihi",
            "length",
        ),
        (
            vec![Step::Tokens([hi.clone(), vec![eos], hi.clone()].concat())],
            json!({"ignore_eos": true, "skip_special_tokens": false}),
            "hi<|eos|>hi",
            "length",
        ),
    ] {
        door.will(&steps);
        let mut body = json!({"prompt": "x", "return_token_ids": true});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        let whole = door.ok(PATH, body).await;
        let choice = &whole["choices"][0];
        assert_eq!(
            (choice["text"].as_str(), choice["finish_reason"].as_str()),
            (Some(expected), Some(reason)),
            "{extra}"
        );
        assert_eq!(
            whole["usage"]["completion_tokens"],
            choice["token_ids"].as_array().unwrap().len()
        );
        if reason == "stop" {
            assert_eq!(
                choice["matched_stop"],
                choice["token_ids"]
                    .as_array()
                    .unwrap()
                    .last()
                    .unwrap()
                    .clone(),
                "returned as an id"
            );
        }
    }
}

#[tokio::test]
async fn logprobs_are_parallel_lists_along_the_text() {
    let door = door();
    let ids = door.will_say("caf\u{e9} 🎉 ok", 2);
    let text = door.text.clone().unwrap();
    let whole = door
        .ok(
            PATH,
            json!({"prompt": "x", "max_tokens": 60, "logprobs": 2}),
        )
        .await;
    let logprobs = &whole["choices"][0]["logprobs"];
    let list = |name: &str| logprobs[name].as_array().unwrap().clone();
    assert_eq!(
        [
            list("tokens").len(),
            list("token_logprobs").len(),
            list("top_logprobs").len(),
            list("text_offset").len()
        ],
        [ids.len(); 4]
    );
    for (i, id) in ids.iter().enumerate() {
        let expected = logprobs_of(*id, 2);
        assert_eq!(
            list("token_logprobs")[i].as_f64().unwrap() as f32,
            expected.logprob
        );
        assert!(
            list("top_logprobs")[i].as_object().unwrap().len() == 3,
            "two and the token itself"
        );
        let before = text.decode(&ids[..i], true).unwrap();
        let certain = before.trim_end_matches('\u{fffd}').chars().count() as u64;
        assert_eq!(list("text_offset")[i].as_u64(), Some(certain), "token {i}");
    }
    assert!(
        list("tokens")
            .iter()
            .any(|t| t.as_str().unwrap().starts_with("bytes:\\x")),
        "a part of a character"
    );

    let chunks = door
        .post(
            PATH,
            json!({"prompt": "x", "max_tokens": 60, "logprobs": 2, "stream": true}),
        )
        .await
        .chunks();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let parts = chunks
            .iter()
            .filter_map(|c| c["choices"][0]["logprobs"][name].as_array());
        assert_eq!(
            parts.flatten().cloned().collect::<Vec<_>>(),
            list(name),
            "{name}"
        );
    }
}

#[tokio::test]
async fn echo_shows_the_prompt_and_its_logprobs() {
    let door = door();
    let text = door.text.clone().unwrap();
    let prompt = "naïve ROMEO:";
    let ids = text.encode(prompt).unwrap();
    let said = door.will_say(" ay", 1);
    for (sent, shown) in [
        (json!(prompt), prompt.to_owned()),
        (json!(ids), prompt.to_owned()),
    ] {
        let body = json!({"prompt": sent, "echo": true, "logprobs": 1, "max_tokens": 9});
        let whole = door.ok(PATH, body.clone()).await;
        let choice = &whole["choices"][0];
        assert_eq!(choice["text"], format!("{shown} ay"));
        let list = |name: &str| choice["logprobs"][name].as_array().unwrap().clone();
        assert_eq!(list("tokens").len(), ids.len() + said.len());
        assert!(list("token_logprobs")[0].is_null() && list("top_logprobs")[0].is_null());
        assert!(list("token_logprobs")[1..].iter().all(Value::is_f64));
        assert_eq!(
            list("token_logprobs")[1].as_f64().unwrap() as f32,
            logprobs_of(ids[1], 1).logprob
        );
        let offsets: Vec<_> = list("text_offset")
            .iter()
            .map(|o| o.as_u64().unwrap() as usize)
            .collect();
        assert_eq!(
            (offsets[0], offsets[ids.len()]),
            (0, prompt.chars().count())
        );
        assert!(offsets.is_sorted());
        assert_eq!(
            door.last_request().sampling.unwrap().prompt_logprobs,
            Some(1)
        );

        let mut streaming = body;
        streaming["stream"] = true.into();
        let chunks = door.post(PATH, streaming).await.chunks();
        assert_eq!(streamed_text(&chunks), format!("{shown} ay"));
        let tokens = chunks
            .iter()
            .filter_map(|c| c["choices"][0]["logprobs"]["tokens"].as_array());
        assert_eq!(
            tokens.flatten().cloned().collect::<Vec<_>>(),
            list("tokens")
        );
    }
    door.ok(PATH, json!({"prompt": prompt, "logprobs": 1}))
        .await;
    assert_eq!(
        door.last_request().sampling.unwrap().prompt_logprobs,
        None,
        "only echo needs the prompt's"
    );
}

#[tokio::test]
async fn the_prompt_alone_can_be_asked_about() {
    let door = door();
    door.will_say("never shown", 1);
    let body = json!({"prompt": "ROMEO: ay", "echo": true, "logprobs": 0, "max_tokens": 0});
    for stream in [false, true] {
        let mut body = body.clone();
        body["stream"] = stream.into();
        let answer = door.post(PATH, body).await;
        let text = if stream {
            streamed_text(&answer.chunks())
        } else {
            answer.json()["choices"][0]["text"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        assert_eq!(text, "ROMEO: ay");
        if !stream {
            assert_eq!(answer.json()["usage"]["completion_tokens"], 0);
            let tops = answer.json()["choices"][0]["logprobs"]["top_logprobs"].clone();
            assert!(
                tops.as_array().unwrap()[1..]
                    .iter()
                    .all(|t| t.as_object().unwrap().len() == 1),
                "none but the token itself"
            );
        }
    }
    let (status, param, _) = door
        .refused(PATH, json!({"prompt": "a", "max_tokens": 0}))
        .await;
    assert_eq!((status, param.as_deref()), (400, Some("max_tokens")));
}

#[tokio::test]
async fn output_fits_the_context() {
    let door = door();
    door.will_say("x", 1);
    let prompt = vec![5; 505];
    door.ok(PATH, json!({"prompt": prompt})).await;
    assert_eq!(
        door.last_request().sampling.unwrap().max_tokens,
        Some(7),
        "the default is cut to what is left"
    );
    door.ok(PATH, json!({"prompt": prompt, "max_tokens": 7}))
        .await;
    let (status, param, message) = door
        .refused(PATH, json!({"prompt": prompt, "max_tokens": 8}))
        .await;
    assert_eq!((status, param.as_deref()), (400, Some("max_tokens")));
    assert!(message.contains("512"), "{message}");
}

#[tokio::test]
async fn without_a_tokenizer_token_ids_are_served_and_text_says_the_way_out() {
    let door = door_with(FrontLimits::default(), false);
    door.will(&[Step::Tokens(vec![7, 8]), Step::Tokens(vec![9])]);
    let whole = door
        .ok(
            PATH,
            json!({"prompt": [1, 2, 3], "logprobs": 1, "echo": true}),
        )
        .await;
    let choice = &whole["choices"][0];
    assert_eq!(
        (&choice["token_ids"], &choice["text"]),
        (&json!([7, 8, 9]), &json!(""))
    );
    assert_eq!(choice["logprobs"]["tokens"][3], "token_id:7");
    let chunks = door
        .post(PATH, json!({"prompt": [1, 2, 3], "stream": true}))
        .await
        .chunks();
    let ids = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["token_ids"].as_array())
        .flatten();
    assert_eq!(
        ids.map(|v| v.as_u64().unwrap()).collect::<Vec<_>>(),
        [7, 8, 9]
    );
    for (path, body, field) in [
        (PATH, json!({"prompt": "text"}), "prompt"),
        (PATH, json!({"prompt": [1], "stop": "x"}), "stop"),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "hi"}]}),
            "messages",
        ),
        ("/tokenize", json!({"prompt": "text"}), "prompt"),
        ("/detokenize", json!({"tokens": [1]}), "tokens"),
    ] {
        let (status, param, message) = door.refused(path, body).await;
        assert_eq!((status, param.as_deref()), (400, Some(field)), "{message}");
        assert!(
            message.contains("tokenizer") && message.contains("token"),
            "{message}"
        );
    }
}
