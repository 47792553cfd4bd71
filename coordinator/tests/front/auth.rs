//! Keys at the door: every path of the router and every gRPC method, with and without.

use std::time::Duration;

use guild_coordinator::front::{OPEN, guard, paths};
use guild_node::keys::{ApiKeys, MAX_NAME_BYTES, NewKey};
use guild_node::serve::{Server, bind};
use guild_node::{RECHECK, Shutdown};
use guild_proto::inference::v1::ModelInfoRequest;
use guild_proto::inference::v1::inference_client::InferenceClient;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::metadata::MetadataValue;
use tonic::service::Routes;
use tonic::{Code, Request};

use crate::fake::door;

/// A front door on a port, with one key.
struct Closed {
    dir: TempDir,
    secret: String,
    address: String,
}

impl Closed {
    async fn open() -> Closed {
        let dir = TempDir::new().unwrap();
        let key = NewKey::draw("tester").unwrap();
        let path = dir.path().join("keys");
        std::fs::write(&path, &key.line).unwrap();
        let keys = ApiKeys::open(&path).unwrap();
        let listener = bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server::on(Routes::from(door().front.router()), true)
            .await
            .guarded(Some(guard(keys)));
        server.health().set_serving("", true).await;
        tokio::spawn(server.run(listener, Shutdown::new(), Duration::ZERO));
        Closed {
            dir,
            secret: key.secret,
            address,
        }
    }

    /// The answer to raw request lines, so that no client tidies up what is sent.
    async fn raw(&self, start: &str, headers: &[&str]) -> String {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        let mut request = format!("{start} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
        for header in headers {
            request.push_str(header);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn bearer(&self) -> String {
        format!("authorization: Bearer {}", self.secret)
    }
}

/// `/package.Service/Method` of everything the wire has, and of what every port adds.
fn methods() -> Vec<String> {
    let mut methods = Vec::new();
    for set in [
        guild_proto::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
    ] {
        for file in FileDescriptorSet::decode(set).unwrap().file {
            for service in &file.service {
                for method in &service.method {
                    let (package, service) = (file.package(), service.name());
                    methods.push(format!("/{package}.{service}/{}", method.name()));
                }
            }
        }
    }
    for version in ["v1", "v1alpha"] {
        let service = format!("/grpc.reflection.{version}.ServerReflection");
        methods.push(format!("{service}/ServerReflectionInfo"));
    }
    methods
}

#[tokio::test]
async fn every_route_asks_for_a_key_but_health() {
    let door = Closed::open().await;
    let unknown = ["/", "/v2", "/admin", "/v1/completions/", "/health/"];
    let http = paths()
        .chain(unknown)
        .map(|path| path.replace("{*id}", "demo"));
    for path in http {
        for method in ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"] {
            let start = format!("{method} {path}");
            let answer = door.raw(&start, &[]).await;
            if OPEN.contains(&path.as_str()) {
                assert!(!answer.contains(" 401 "), "{start}: {answer}");
                continue;
            }
            assert!(answer.starts_with("HTTP/1.1 401 "), "{start}: {answer}");
            assert!(
                answer.contains("www-authenticate: Bearer"),
                "{start}: {answer}"
            );
            if method == "GET" {
                assert!(answer.contains("\"code\":\"invalid_api_key\""), "{answer}");
            }
            let answer = door.raw(&start, &[&door.bearer()]).await;
            assert!(!answer.contains(" 401 "), "{start}: {answer}");
        }
    }
}

#[tokio::test]
async fn every_grpc_method_asks_for_a_key_but_health() {
    let door = Closed::open().await;
    let methods = methods();
    assert!(methods.len() > 10, "{methods:?}");
    for open in &OPEN[1..] {
        assert!(methods.iter().any(|method| method == open), "{open}");
    }
    let grpc = "content-type: application/grpc";
    for method in &methods {
        let start = format!("POST {method}");
        let answer = door.raw(&start, &[grpc, "content-length: 0"]).await;
        let refused = answer.contains("grpc-status: 16");
        assert_eq!(
            refused,
            !OPEN.contains(&method.as_str()),
            "{method}: {answer}"
        );
        let answer = door
            .raw(&start, &[grpc, "content-length: 0", &door.bearer()])
            .await;
        assert!(!answer.contains("grpc-status: 16"), "{method}: {answer}");
    }

    let channel = guild_node::channel::lazy(&door.address).unwrap();
    let mut client = InferenceClient::new(channel);
    let ask = |bearer: &str| {
        let mut request = Request::new(ModelInfoRequest {});
        let value: MetadataValue<_> = bearer.parse().unwrap();
        request.metadata_mut().insert("authorization", value);
        request
    };
    let error = client.model_info(ModelInfoRequest {}).await.unwrap_err();
    assert_eq!(error.code(), Code::Unauthenticated);
    let good = format!("Bearer {}", door.secret);
    assert!(client.model_info(ask(&good)).await.is_ok());
    let error = client.model_info(ask("Bearer x")).await.unwrap_err();
    assert_eq!(error.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn no_spelling_of_path_or_header_gets_round_the_guard() {
    let door = Closed::open().await;
    for path in [
        "//health",
        "/health/../v1/models",
        "/health/%2e%2e/v1/models",
        "/%68ealth",
        "/HEALTH",
        "/health;/v1/models",
        "/v1/models?/health",
        "/v1/models#/health",
        "/grpc.health.v1.Health/../v1/models",
        "/grpc.health.v1.Health/List",
        "http://x/v1/models",
    ] {
        let answer = door.raw(&format!("GET {path}"), &[]).await;
        let refused = ["401", "400"].map(|code| format!("HTTP/1.1 {code} "));
        assert!(
            refused.iter().any(|r| answer.starts_with(r)),
            "{path}: {answer}"
        );
    }
    let secret = &door.secret;
    for bad in [
        String::new(),
        "authorization: ".to_owned(),
        "authorization: Bearer".to_owned(),
        "authorization: Bearer ".to_owned(),
        "authorization: Bearer tester".to_owned(),
        format!("authorization: {secret}"),
        format!("authorization: Basic {secret}"),
        format!("authorization: Bearer {secret}x"),
        format!("authorization: Bearer {}", &secret[..secret.len() - 1]),
        format!("authorization: Bearer {}", secret.to_uppercase()),
        format!("authorization: Bearer x, Bearer {secret}"),
        format!("authorization: Bearer {secret}\r\nauthorization: Bearer x"),
        format!("authorization: Bearer {secret}\r\nauthorization: Bearer {secret}"),
        format!("x-api-key: {secret}"),
        format!("cookie: authorization=Bearer {secret}"),
        "authorization: Bearer \u{1}".to_owned(),
    ] {
        let headers: Vec<&str> = Some(bad.as_str())
            .filter(|h| !h.is_empty())
            .into_iter()
            .collect();
        let answer = door.raw("GET /v1/models", &headers).await;
        assert!(!answer.contains(" 200 "), "{bad}: {answer}");
    }
    for good in [
        format!("authorization: bearer {secret}"),
        format!("Authorization:   BEARER   {secret}  "),
    ] {
        let answer = door.raw("GET /v1/models", &[&good]).await;
        assert!(answer.contains(" 200 "), "{good}: {answer}");
    }
}

#[tokio::test]
async fn the_file_of_keys_is_read_again() {
    let door = Closed::open().await;
    let path = door.dir.path().join("keys");
    let enters = async |secret: &str| {
        let header = format!("authorization: Bearer {secret}");
        let answer = door.raw("GET /v1/models", &[&header]).await;
        answer.contains(" 200 ")
    };
    let wait = || tokio::time::sleep(RECHECK + Duration::from_millis(100));
    assert!(enters(&door.secret).await);
    let second = NewKey::draw("second").unwrap();
    std::fs::write(&path, format!("# one\n\n{}\n", second.line)).unwrap();
    wait().await;
    assert!(enters(&second.secret).await && !enters(&door.secret).await);
    // What makes no sense changes nothing; an empty file is taken at its word.
    std::fs::write(&path, "rubbish").unwrap();
    wait().await;
    assert!(enters(&second.secret).await);
    std::fs::write(&path, "").unwrap();
    wait().await;
    assert!(!enters(&second.secret).await);
}

#[test]
fn a_file_of_keys_is_checked_line_by_line() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("keys");
    let line = NewKey::draw("a").unwrap().line;
    let hash = line.split_once(':').unwrap().1;
    let cases = [
        (String::new(), "no key"),
        ("# nobody\n".to_owned(), "no key"),
        ("a\n".to_owned(), "line 1"),
        (format!("{line}\n{line}"), "second key named a"),
        (format!("{line}\nb:{}", &hash[1..]), "line 2"),
        (format!("b:{}g", &hash[1..]), "SHA-256"),
        (format!(":{hash}"), "name"),
        (format!("a b:{hash}"), "name"),
        (format!("{}:{hash}", "x".repeat(MAX_NAME_BYTES + 1)), "name"),
    ];
    for (text, problem) in cases {
        std::fs::write(&path, &text).unwrap();
        let error = ApiKeys::open(&path).unwrap_err().to_string();
        assert!(
            error.contains("keys") && error.contains(problem),
            "{text}: {error}"
        );
    }
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(ApiKeys::open(&path).is_err());
    // A file with a key in clear is refused, and the key is not repeated in the log.
    let secret = NewKey::draw("a").unwrap().secret;
    std::fs::write(&path, &secret).unwrap();
    let error = ApiKeys::open(&path).unwrap_err().to_string();
    assert!(!error.contains(&secret), "{error}");
    std::fs::write(&path, line.to_uppercase().replace("A:", "a:")).unwrap();
    assert!(ApiKeys::open(&path).is_ok());
    assert!(NewKey::draw("").is_err() && NewKey::draw("a:b").is_err());
}
