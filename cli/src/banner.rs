//! What a role says when it starts: one screen for people, one event for machines.

use std::io::Write as _;
use std::net::SocketAddr;

use guild_attention_node::KvMemory;
use guild_model::cache::{Format, LatentCache};
use guild_model::checkpoint::Dtype;
use guild_model::{Checkpoint, Cpu};
use guild_node::telemetry::LogFormat;
use guild_node::tls::Tls;

use crate::args::Engine;
use crate::failure::Failure;
use crate::security::Door;
use crate::units;

/// Widest name of a line.
const NAME_WIDTH: usize = 10;

/// Lines of the start banner, in the order they are added.
pub(crate) struct Banner {
    roles: String,
    lines: Vec<(&'static str, String)>,
    warnings: Vec<String>,
}

impl Banner {
    pub(crate) fn new(roles: impl Into<String>) -> Self {
        Self {
            roles: roles.into(),
            lines: Vec::new(),
            warnings: Vec::new(),
        }
    }

    pub(crate) fn line(&mut self, name: &'static str, value: impl Into<String>) -> &mut Self {
        self.lines.push((name, value.into()));
        self
    }

    pub(crate) fn warn(&mut self, warning: impl Into<String>) -> &mut Self {
        self.warnings.push(warning.into());
        self
    }

    /// Name, identity and shape of the model.
    ///
    /// # Errors
    /// The checkpoint has no digest.
    pub(crate) fn model(
        &mut self,
        name: &str,
        checkpoint: &Checkpoint,
    ) -> Result<&mut Self, Failure> {
        let digest = checkpoint.digest()?;
        let c = checkpoint.config();
        self.line(
            "model",
            format!(
                "{name} ({}, {} parameters, {} active), digest {}",
                c.model_type,
                units::parameters(c.parameters()),
                units::parameters(c.active_parameters()),
                units::short_digest(&digest)
            ),
        );
        let experts = match c.moe_layers().count() {
            0 => "no experts".to_owned(),
            moe => format!(
                "{moe} with {} experts, top-{} and {} shared",
                c.n_routed_experts, c.num_experts_per_tok, c.n_shared_experts
            ),
        };
        let mtp = match c.num_nextn_predict_layers {
            0 => String::new(),
            n => format!(", {n} MTP"),
        };
        Ok(self.line("layers", format!("{}: {experts}{mtp}", c.num_hidden_layers)))
    }

    /// What computes.
    pub(crate) fn cpu(&mut self, cpu: &Cpu) -> &mut Self {
        self.line("compute", cpu.describe())
    }

    /// Weights as they are stored and kept.
    pub(crate) fn weights(&mut self, checkpoint: &Checkpoint, dtype: Dtype) -> &mut Self {
        let stored = units::bytes(checkpoint.required_bytes());
        let kept = match dtype {
            Dtype::Auto => "kept as stored",
            Dtype::F32 => "widened to f32",
            Dtype::Bf16 => "rounded to bf16",
            Dtype::Fp8 | Dtype::Int8 { .. } | Dtype::Int4 { .. } => "quantised",
        };
        self.line(
            "weights",
            format!("{stored} on disk, {kept} (--dtype {dtype}); activations f32"),
        )
    }

    /// Room for the latent KV cache of one attention node.
    pub(crate) fn kv(&mut self, checkpoint: &Checkpoint, engine: Engine) -> &mut Self {
        let c = checkpoint.config();
        let format = engine.latents.format().unwrap_or(Format::F32);
        let each = LatentCache::bytes_per_token(c, format) as u64;
        let longest = c.max_position_embeddings as u64;
        let context = if engine.max_context == 0 {
            longest
        } else {
            longest.min(engine.max_context.into())
        };
        let useful = u64::from(engine.max_running).saturating_mul(context);
        let room = match engine.kv_memory {
            KvMemory::Auto => format!(
                "up to {} tokens, as half of the free memory allows",
                units::count(useful)
            ),
            KvMemory::Bytes(n) => format!(
                "{} tokens in {}",
                units::count(useful.min(n / each.max(1))),
                units::bytes(n)
            ),
        };
        self.line(
            "KV cache",
            format!(
                "{room}; {} a token in {format}, context {}",
                units::bytes(each),
                units::count(context)
            ),
        )
    }

    /// The line to paste into another terminal.
    pub(crate) fn try_it(
        &mut self,
        name: &str,
        checkpoint: &Checkpoint,
        http: SocketAddr,
        door: &Door,
    ) -> &mut Self {
        // Without a tokenizer only token ids are served.
        let text = checkpoint.dir().join("tokenizer.json").exists();
        let prompt = if text {
            serde_json::json!("ROMEO:")
        } else {
            serde_json::json!([1, 2, 3])
        };
        let body = serde_json::json!({"model": name, "prompt": prompt, "max_tokens": 64});
        let scheme = door.scheme();
        let trust = door.tls.as_ref().map_or("", |_| " --cacert CA.pem");
        let key = match &door.keys {
            Some(_) => " -H \"authorization: Bearer $GUILD_API_KEY\"",
            None => "",
        };
        self.line(
            "try",
            format!(
                "curl{trust} {scheme}://{http}/v1/completions{key} -H 'content-type: application/json' -d '{body}'"
            ),
        )
    }

    /// How this role and the others know each other.
    pub(crate) fn tls(&mut self, tls: Option<&Tls>) -> &mut Self {
        match tls {
            Some(tls) => self.line("mutual TLS", tls.identity().to_string()),
            None => self.warn(
                "no TLS: whoever reaches this node's port is taken for a member of the cluster; see `guild certs`",
            ),
        }
    }

    /// The risk that `--insecure` takes.
    pub(crate) fn insecure(&mut self, insecure: bool) -> &mut Self {
        if insecure {
            self.warn(
                "--insecure: whoever reaches these addresses can use and disturb this cluster",
            );
        }
        self
    }

    /// Shows it on stderr.
    pub(crate) fn show(&self, format: LogFormat) {
        let version = env!("CARGO_PKG_VERSION");
        if format == LogFormat::Json {
            let lines: serde_json::Map<String, serde_json::Value> = self
                .lines
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.as_str().into()))
                .collect();
            tracing::info!(version, roles = self.roles, start = %serde_json::Value::from(lines), "guild starts");
        } else {
            // A banner that nobody can read is no reason to stop.
            let mut stderr = std::io::stderr().lock();
            let _ = writeln!(stderr, "guild {version}  {}", self.roles);
            for (name, value) in &self.lines {
                let _ = writeln!(stderr, "  {name:<NAME_WIDTH$} {value}");
            }
        }
        for warning in &self.warnings {
            tracing::warn!("{warning}");
        }
    }
}
