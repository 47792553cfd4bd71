//! What every role counts, as a real Prometheus sees it: it scrapes all of them, its linter has nothing to say, and
//! what a load does shows.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use guild_tests::client::{generate_all, mixed_workload};
use guild_tests::house::{House, Plan};
use guild_tests::http;
use guild_tests::process::{LOOPBACK, START_LIMIT, free_port};
use serde_json::Value;
use tempfile::TempDir;

/// Between two scrapes.
const INTERVAL: &str = "200ms";
const POLL: Duration = Duration::from_millis(100);
/// What clients call the model; its folder is called otherwise.
const NAME: &str = "called otherwise";

/// A Prometheus on loopback; killed when dropped.
struct Prometheus {
    process: Child,
    address: String,
    _data: TempDir,
}

impl Prometheus {
    /// Scrapes `targets`, each under the job that is named beside it. None where it is not installed.
    fn start(targets: &[(&str, &str)]) -> Option<Prometheus> {
        let there = |program: &str| {
            let ran = Command::new(program)
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            ran.is_ok_and(|status| status.success())
        };
        if !there("prometheus") || !there("promtool") {
            let ci = std::env::var_os("CI").is_some();
            assert!(!ci, "prometheus is missing: cargo xtask test installs it");
            return None;
        }
        let data = tempfile::tempdir().unwrap();
        let mut config = format!(
            "global:\n  scrape_interval: {INTERVAL}\n  scrape_timeout: {INTERVAL}\nscrape_configs:\n"
        );
        for (index, (job, target)) in targets.iter().enumerate() {
            config += &format!(
                "- job_name: {job}-{index}\n  static_configs:\n  - targets: ['{target}']\n    labels: {{role: {job}}}\n"
            );
        }
        let file = data.path().join("prometheus.yml");
        std::fs::write(&file, config).unwrap();
        let address = format!("{LOOPBACK}:{}", free_port());
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                data.path().join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Some(Prometheus {
            process,
            address,
            _data: data,
        })
    }

    /// What a query comes to: its series, each by its role, and their values. Nothing while it is not up.
    fn query(&self, query: &str) -> Vec<(String, f64)> {
        let path = format!("/api/v1/query?query={}", query.replace(' ', "%20"));
        let Ok(answer) = http::get(&self.address, &path) else {
            return Vec::new();
        };
        if answer.status != 200 {
            return Vec::new();
        }
        let answer = answer.json();
        let series = answer["data"]["result"].as_array().unwrap();
        let read = |one: &Value| {
            let role = one["metric"]["role"].as_str().unwrap_or_default();
            let value = one["value"][1].as_str().unwrap();
            (role.to_owned(), value.parse().unwrap())
        };
        series.iter().map(read).collect()
    }

    /// Waits until a query comes to what is asked of it.
    fn wait(&self, query: &str, what: impl Fn(&[(String, f64)]) -> bool) {
        let end = Instant::now() + START_LIMIT;
        loop {
            let found = self.query(query);
            if what(&found) {
                return;
            }
            assert!(Instant::now() < end, "{query}: {found:?}");
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What Prometheus' linter says of a page.
fn lint(page: &str) -> (bool, String) {
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = promtool.stdin.take().unwrap();
    stdin.write_all(page.as_bytes()).unwrap();
    drop(stdin);
    let out = promtool.wait_with_output().unwrap();
    let said = [out.stdout, out.stderr].concat();
    (
        out.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_scrapes_every_role_and_sees_what_a_load_does() {
    let named = ["--served-model-name", NAME].map(str::to_owned).to_vec();
    let house = House::start(Plan {
        attention: 1,
        experts: 2,
        replicas: 1,
        coordinator_flags: named.clone(),
        node_flags: [&["--threads".to_owned(), "1".to_owned()], &named[..]].concat(),
        attention_flags: ["--speculate", "2"].map(str::to_owned).into(),
        ..Plan::default()
    })
    .await;
    let ports: Vec<(&str, &str)> = house
        .nodes()
        .map(|node| (node.name.split('-').next().unwrap(), &node.metrics[..]))
        .collect();
    // The front door says the same to whoever may come in there.
    let door = ("door", &house.coordinators[0].http[..]);
    let targets: Vec<_> = ports.iter().copied().chain([door]).collect();
    for (role, at) in &ports {
        let health = http::get(at, "/health").unwrap();
        assert_eq!(health.status, 200, "{role}: {}", health.text());
        assert_eq!(http::get(at, "/v1/models").unwrap().status, 404, "{role}");
    }
    let Some(prometheus) = Prometheus::start(&targets) else {
        return println!("SKIPPED: prometheus is not installed; cargo xtask test installs it");
    };
    let all_up = |found: &[(String, f64)]| {
        found.len() == targets.len() && found.iter().all(|&(_, up)| up == 1.0)
    };
    prometheus.wait("up", all_up);

    let requests = mixed_workload(2048);
    generate_all(house.grpc(), &requests).await;
    let tokens: u32 = { requests.iter() }
        .map(|request| request.sampling.as_ref().unwrap().max_tokens.unwrap())
        .sum();
    for (role, counter, at_least) in [
        (
            "coordinator",
            "guild_generation_tokens_total",
            f64::from(tokens),
        ),
        (
            "coordinator",
            "guild_e2e_request_latency_seconds_count",
            16.0,
        ),
        (
            "coordinator",
            "guild_time_to_first_token_seconds_count",
            16.0,
        ),
        ("door", "guild_generation_tokens_total", f64::from(tokens)),
        (
            "attention",
            "guild_generation_tokens_total",
            f64::from(tokens),
        ),
        (
            "attention",
            "guild_inter_token_latency_seconds_count",
            f64::from(tokens - 16),
        ),
        ("attention", "guild_step_duration_seconds_count", 10.0),
        ("attention", "guild_rows_total", f64::from(tokens)),
        ("attention", "guild_exchange_rows_total", f64::from(tokens)),
        (
            "attention",
            "guild_spec_decode_num_draft_tokens_total",
            16.0,
        ),
        ("attention", "guild_placement_epoch", 1.0),
        ("expert", "guild_expert_rows_total", 100.0),
        ("expert", "guild_expert_batches_total", 10.0),
        ("expert", "guild_expert_wait_seconds_count", 10.0),
        ("expert", "guild_expert_resident_bytes", 1000.0),
        ("expert", "guild_expert_copies_total", 1.0),
        ("expert", "guild_placement_epoch", 1.0),
    ] {
        prometheus.wait(&format!("max by (role) ({counter})"), |found| {
            found
                .iter()
                .any(|(of, value)| of == role && *value >= at_least)
        });
    }
    prometheus.wait("guild_num_requests_running", |found| {
        found.len() == 3 && found.iter().all(|&(_, running)| running == 0.0)
    });
    // Rows that were sent are rows that were run.
    let sum = |query: &str| prometheus.query(query).first().map(|&(_, value)| value);
    let (sent, run) = (
        sum("sum(guild_exchange_rows_total)"),
        sum("sum(guild_expert_rows_total)"),
    );
    assert!(run >= sent && sent > Some(0.0), "{sent:?} {run:?}");
    prometheus.wait("up", all_up);

    for (role, at) in &targets {
        let page = http::get(at, "/metrics").unwrap().text();
        let (clean, said) = lint(&page);
        assert!(clean && said.is_empty(), "{role}:\n{said}\n{page}");
        let label = format!("model_name=\"{NAME}\"");
        let other = page
            .lines()
            .find(|line| !line.starts_with('#') && !line.contains(&label));
        assert_eq!(other, None, "{role}");
    }
}
