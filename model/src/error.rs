//! The one error of this room.
//!
//! Every variant says where the fault is (field, file, tensor) and what would
//! be right. Nothing here knows of requests or nodes.

use std::path::{Path, PathBuf};

/// Why a model could not be described, opened or computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// `config.json` (or `generation_config.json`) says something that is unknown or inconsistent.
    #[error("config.json: field `{field}`: {reason}")]
    Config {
        /// Name of the field as written in the file; nested fields joined by dots.
        field: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A file is missing, unreadable or malformed as a whole.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// One tensor of a checkpoint is missing or wrong.
    #[error("{}: tensor `{tensor}`: {reason}", file.display())]
    Tensor {
        /// The file that holds, or should hold, the tensor.
        file: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// What came as an expert from another node is not that expert.
    #[error("blob of layer {layer}, expert {expert}: {reason}")]
    Blob {
        /// Layer that was asked for.
        layer: usize,
        /// Logical expert that was asked for.
        expert: usize,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer cannot be loaded or refuses its input.
    #[error("tokenizer {}: {reason}", path.display())]
    Tokenizer {
        /// `tokenizer.json` or `tokenizer_config.json`.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The chat template cannot be loaded or refuses its input.
    #[error("chat template: {reason}")]
    Template {
        /// What is wrong and what would be right.
        reason: String,
    },
    /// An argument of a call does not fit the model.
    #[error("{what}: {reason}")]
    Input {
        /// Which argument.
        what: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The tensor library of the reference refused an operation.
    #[error("reference computation: {0}")]
    Compute(#[from] candle_core::Error),
}

impl ModelError {
    /// A fault in one field of the configuration.
    pub fn config(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// A fault of a whole file.
    pub fn file(path: impl AsRef<Path>, reason: impl ToString) -> Self {
        Self::File {
            path: path.as_ref().to_path_buf(),
            reason: reason.to_string(),
        }
    }

    /// A fault of one tensor.
    pub fn tensor(
        file: impl AsRef<Path>,
        tensor: impl Into<String>,
        reason: impl Into<String>,
    ) -> Self {
        Self::Tensor {
            file: file.as_ref().to_path_buf(),
            tensor: tensor.into(),
            reason: reason.into(),
        }
    }

    /// An argument that does not fit the model.
    pub fn input(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Input {
            what: what.into(),
            reason: reason.into(),
        }
    }
}
