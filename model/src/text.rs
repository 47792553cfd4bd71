//! Text: the checkpoint's tokenizer and chat template.
//!
//! Secret of this module: how strings become token ids and token ids strings.
//! It reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`
//! of a checkpoint and nothing else: a template never comes from a client. It
//! uses `tokenizers` and `hf-chat-template` and does not know the network.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use hf_chat_template::{ChatTemplate, ChatTemplateField, RenderInput, TokenizerConfig};
use serde_json::{Map, Value};
use tokenizers::{DecoderWrapper, NormalizerWrapper, Tokenizer};

use crate::{Config, ModelError};

mod bytes;
mod detokenizer;
mod stop;

pub use detokenizer::Detokenizer;
pub use stop::{StopMatch, StopStrings};

/// Bytes that `tokenizer.json` may have at most.
pub const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Bytes that `tokenizer_config.json` or `chat_template.jinja` may have at most.
pub const MAX_TEMPLATE_BYTES: u64 = 4 << 20;
/// Bytes that a rendered conversation may have at most.
pub const MAX_RENDERED_BYTES: usize = 16 << 20;
/// Messages that a conversation may have at most.
pub const MAX_MESSAGES: usize = 4096;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// Names that a template gets from here and a client may therefore not set.
const RESERVED: [&str; 9] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "chat_template",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
];

/// Tokenizer and, if the checkpoint has one, chat template.
pub struct Text {
    path: PathBuf,
    tokenizer: Tokenizer,
    bytes: bytes::TokenBytes,
    /// What the tokenizer's configuration asks for beyond its post-processor.
    before: Option<u32>,
    after: Option<u32>,
    template: Option<ChatTemplate>,
    /// The template's source without white space, to look into.
    template_source: String,
}

impl std::fmt::Debug for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Text")
            .field("path", &self.path)
            .field("has_template", &self.has_template())
            .finish_non_exhaustive()
    }
}

impl Text {
    /// Reads the tokenizer of a checkpoint and its chat template.
    ///
    /// `None` when there is no `tokenizer.json`: such a model is served by
    /// token ids. A file that is there and broken is an error.
    pub fn load(dir: &Path, config: &Config) -> Result<Option<Arc<Text>>, ModelError> {
        let path = dir.join(TOKENIZER);
        let Some(json) = read(&path, MAX_TOKENIZER_BYTES)? else {
            return Ok(None);
        };
        let refuse = |reason: String| ModelError::Tokenizer {
            path: path.clone(),
            reason,
        };
        let mut tokenizer =
            Tokenizer::from_bytes(json).map_err(|e| refuse(format!("not a tokenizer: {e}")))?;
        // A prompt is never cut or filled up behind the client's back.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|e| refuse(e.to_string()))?;

        let settings_path = dir.join(TOKENIZER_CONFIG);
        let settings: TokenizerConfig = match read(&settings_path, MAX_TEMPLATE_BYTES)? {
            Some(json) => serde_json::from_slice(&json).map_err(|e| ModelError::Tokenizer {
                path: settings_path,
                reason: format!("not a tokenizer configuration: {e}"),
            })?,
            None => TokenizerConfig::default(),
        };
        let (template, template_source) = template(dir, &settings)?.unzip();

        let bytes = bytes::TokenBytes::new(&tokenizer, config.vocab_size);
        let mut text = Text {
            path,
            tokenizer,
            bytes,
            before: None,
            after: None,
            template,
            template_source: template_source.unwrap_or_default(),
        };
        text.add_configured_tokens(&settings)?;
        Ok(Some(Arc::new(text)))
    }

    /// `add_bos_token` and `add_eos_token` of the tokenizer's configuration ask
    /// for a token at the ends; a post-processor that puts it there already
    /// does it alone.
    fn add_configured_tokens(&mut self, settings: &TokenizerConfig) -> Result<(), ModelError> {
        let wanted = |flag: &str| {
            settings
                .extra
                .get(flag)
                .and_then(Value::as_bool)
                .unwrap_or(false)
        };
        let id = |field: &Option<hf_chat_template::TokenField>, name: &str| {
            let token = field.as_ref().and_then(|f| f.as_str());
            token
                .and_then(|t| self.tokenizer.token_to_id(t))
                .ok_or_else(|| ModelError::Tokenizer {
                    path: self.path.with_file_name(TOKENIZER_CONFIG),
                    reason: format!(
                        "`add_{name}` is true but `{name}` names no token of {TOKENIZER}"
                    ),
                })
        };
        let probe = self.encode("a")?;
        let mut before = None;
        if wanted("add_bos_token") {
            before =
                Some(id(&settings.bos_token, "bos_token")?).filter(|b| probe.first() != Some(b));
        }
        let mut after = None;
        if wanted("add_eos_token") {
            after = Some(id(&settings.eos_token, "eos_token")?).filter(|e| probe.last() != Some(e));
        }
        (self.before, self.after) = (before, after);
        Ok(())
    }

    /// Token ids of a prompt, with the special tokens that the checkpoint puts
    /// around one. Special tokens written out in the text are taken as such, as
    /// the reference tokenizers do.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let mut ids: Vec<u32> = self.before.into_iter().collect();
        ids.extend_from_slice(self.tokenize(text, true)?.get_ids());
        ids.extend(self.after);
        Ok(ids)
    }

    /// Token ids of the text alone; what a rendered chat template needs, which
    /// writes its special tokens itself.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        Ok(self.tokenize(text, false)?.get_ids().to_vec())
    }

    fn tokenize(&self, text: &str, special: bool) -> Result<tokenizers::Encoding, ModelError> {
        self.tokenizer
            .encode_fast(text, special)
            .map_err(|e| self.refuse(format!("cannot tokenize the text: {e}")))
    }

    /// Text of token ids. Ids that the tokenizer does not know (a padded
    /// vocabulary has some) stand for no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, ModelError> {
        self.tokenizer
            .decode(ids, skip_special)
            .map_err(|e| self.refuse(format!("cannot decode the tokens: {e}")))
    }

    /// Bytes of one token, special or not; empty when the tokenizer does not
    /// know the id. A token may hold a part of a character only.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.of(id)
    }

    /// Text of one token; bytes that are no UTF-8 become U+FFFD.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// Whether the tokenizer takes this token for a special one, which plain
    /// output leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.bytes.is_special(id)
    }

    /// Bytes of the longest token: a text of `n` bytes has at least
    /// `n / max_token_bytes` tokens, known before any is made. `None` when the
    /// tokenizer may drop parts of a text, so that nothing is known.
    pub fn max_token_bytes(&self) -> Option<usize> {
        let normalizes = match self.tokenizer.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::Sequence(s)) => !s.as_ref().is_empty(),
            Some(_) => true,
        };
        let strips = self
            .tokenizer
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .values()
            .any(|t| t.lstrip || t.rstrip);
        (self.bytes.is_byte_level() && !normalizes && !strips).then(|| self.bytes.longest())
    }

    /// Whether each token stands for some bytes, and a text for those of its tokens.
    pub fn is_byte_level(&self) -> bool {
        self.bytes.is_byte_level()
    }

    /// The file that the tokenizer was read from.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The token that is written so, if there is one.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Whether the checkpoint has a chat template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Whether these words stand in the chat template's source, white space
    /// aside: families are told apart by it.
    pub fn template_mentions(&self, words: &str) -> bool {
        self.template_source.contains(words)
    }

    /// Renders a conversation with the checkpoint's template.
    ///
    /// `messages` are objects with `role` and `content`, as in the OpenAI API,
    /// and `tools` those of its `tools`; `variables` are further names that the
    /// template may read.
    pub fn chat(
        &self,
        messages: &[Value],
        tools: &[Value],
        add_generation_prompt: bool,
        variables: &Map<String, Value>,
    ) -> Result<String, ModelError> {
        let refuse = |reason: String| ModelError::Template { reason };
        let template = self.template.as_ref().ok_or_else(|| {
            refuse("this checkpoint has none (neither chat_template.jinja nor `chat_template` in tokenizer_config.json); send a plain prompt".into())
        })?;
        if messages.len() > MAX_MESSAGES {
            return Err(refuse(format!(
                "{} messages, at most {MAX_MESSAGES} are rendered",
                messages.len()
            )));
        }
        if let Some(name) = RESERVED.iter().find(|name| variables.contains_key(**name)) {
            return Err(refuse(format!(
                "variable `{name}` is set by the server and cannot be given"
            )));
        }
        // As they came: what is null must be null to the template, and not absent.
        let mut extra = variables.clone();
        extra.insert("messages".to_owned(), messages.into());
        let input = RenderInput {
            tools: tools.to_vec(),
            add_generation_prompt,
            extra,
            ..RenderInput::default()
        };
        let rendered = template.render(&input).map_err(|e| refuse(e.to_string()))?;
        if rendered.len() > MAX_RENDERED_BYTES {
            return Err(refuse(format!(
                "the conversation renders to {} bytes, at most {MAX_RENDERED_BYTES} are allowed",
                rendered.len()
            )));
        }
        Ok(rendered)
    }

    fn refuse(&self, reason: String) -> ModelError {
        ModelError::Tokenizer {
            path: self.path.clone(),
            reason,
        }
    }
}

/// Contents of a file of at most `limit` bytes; `None` when it is not there.
fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, ModelError> {
    let size = match fs::metadata(path) {
        Ok(meta) => meta.len(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(ModelError::file(path, e)),
    };
    if size > limit {
        return Err(ModelError::file(
            path,
            format!("{size} bytes, at most {limit} are read"),
        ));
    }
    fs::read(path)
        .map(Some)
        .map_err(|e| ModelError::file(path, e))
}

/// The chat template, and its source without white space: a file of its own
/// goes before the one in the tokenizer's configuration, as in the reference
/// implementation.
fn template(
    dir: &Path,
    settings: &TokenizerConfig,
) -> Result<Option<(ChatTemplate, String)>, ModelError> {
    let path = dir.join(TEMPLATE);
    let (compiled, source) = match (read(&path, MAX_TEMPLATE_BYTES)?, &settings.chat_template) {
        (Some(source), _) => {
            let source = String::from_utf8(source).map_err(|e| ModelError::file(&path, e))?;
            (
                ChatTemplate::from_template_and_config(&source, settings),
                source,
            )
        }
        (None, Some(field)) => {
            let source = match field {
                ChatTemplateField::Single(source) => source.clone(),
                ChatTemplateField::Named(all) => all.iter().map(|t| t.template.as_str()).collect(),
            };
            (ChatTemplate::from_tokenizer_config(settings), source)
        }
        (None, None) => return Ok(None),
    };
    let compiled = compiled.map_err(|e| ModelError::Template {
        reason: format!("of {}: {e}", dir.display()),
    })?;
    Ok(Some((compiled, source.split_whitespace().collect())))
}

/// Whether decoding is the concatenation of the tokens' bytes.
fn is_byte_level(tokenizer: &Tokenizer) -> bool {
    fn plain(decoder: &DecoderWrapper) -> bool {
        match decoder {
            DecoderWrapper::ByteLevel(_) => true,
            DecoderWrapper::Sequence(s) => matches!(s.get_decoders(), [one] if plain(one)),
            _ => false,
        }
    }
    tokenizer.get_decoder().is_some_and(plain)
}
