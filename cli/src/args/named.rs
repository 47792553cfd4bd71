//! What the model is called.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use guild_model::Checkpoint;

/// The model's name.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Named {
    /// Name of the model for clients and in metrics; default: the name of the folder
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) served_model_name: Option<String>,
}

impl Named {
    /// The name given, else the one that `model` has of itself.
    pub(crate) fn of(&self, model: &Checkpoint) -> String {
        let given = self.served_model_name.clone();
        given.unwrap_or_else(|| model.name())
    }
}
