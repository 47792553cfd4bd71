//! guild.pages.v1: prompts that this node runs for others like it, and those that others run for it.
//!
//! Secret: when a page of somebody else may be taken for one's own. Its digest covers all that its bits
//! depend on: model, numerics, how rows are stored, the name that its tokens and its tenant give it, and
//! its bytes. What has another digest, or comes out of order, is not taken, and no more is asked for. The
//! bits are then the same as if the page had been computed here, and whatever does not come is. This
//! module must not know what a page is used for.

mod fetch;
mod give;

use guild_node::status;
use guild_proto::pages::v1 as wire;
use tonic::{Code, Status};

use crate::moving::PageForm;

pub(crate) use fetch::{Fetching, Helpers, Moved};
pub(crate) use give::give;

/// Names the digests of this version among all that BLAKE3 derives.
const CONTEXT: &str = "guild v1 latent KV page in transit";
/// ErrorInfo reason: the pages of the two nodes are not the same.
const REASON_FORM: &str = "PAGES_DIFFER";
/// Bytes of one message's part of a page.
const PIECE_BYTES: usize = 1 << 20;

/// `form` as it is told to others; `drafts`: with the draft module's layer.
pub(crate) fn told(form: &PageForm, drafts: bool, digest: &str, numerics: &str) -> wire::PageForm {
    wire::PageForm {
        model_digest: digest.to_owned(),
        numerics_class: numerics.to_owned(),
        format: form.format.to_string(),
        page_tokens: form.page_tokens as u32,
        layers: form.layers as u32,
        drafts,
    }
}

/// Whether pages of the form `theirs` are what a node makes whose own are `ours`.
///
/// # Errors
/// FAILED_PRECONDITION: what differs, with both values.
pub(crate) fn agree(ours: &wire::PageForm, theirs: &wire::PageForm) -> Result<(), Status> {
    let numbers = |form: &wire::PageForm| (form.page_tokens.to_string(), form.layers.to_string());
    let ((our_tokens, our_layers), (their_tokens, their_layers)) = (numbers(ours), numbers(theirs));
    let fields = [
        ("model_digest", &ours.model_digest, &theirs.model_digest),
        (
            "numerics_class",
            &ours.numerics_class,
            &theirs.numerics_class,
        ),
        ("format", &ours.format, &theirs.format),
        ("page_tokens", &our_tokens, &their_tokens),
        ("layers", &our_layers, &their_layers),
    ];
    if let Some((field, ours, theirs)) = fields.iter().find(|(_, ours, theirs)| ours != theirs) {
        let text = format!("pages differ in {field}: `{ours}` here, `{theirs}` there");
        return Err(differ(text));
    }
    if theirs.drafts && !ours.drafts {
        let text = "pages differ in drafts: no draft module's layer is kept here; give both nodes the same --speculate";
        return Err(differ(text.to_owned()));
    }
    Ok(())
}

fn differ(text: String) -> Status {
    status::with_reason(Code::FailedPrecondition, REASON_FORM, text, [])
}

/// The digest of a page that has the name `key`.
fn digest(form: &wire::PageForm, key: u128, bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    for text in [&form.model_digest, &form.numerics_class, &form.format] {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.update(&form.page_tokens.to_le_bytes());
    hasher.update(&form.layers.to_le_bytes());
    hasher.update(&[u8::from(form.drafts)]);
    hasher.update(&key.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize().into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn form() -> wire::PageForm {
        wire::PageForm {
            model_digest: "m".to_owned(),
            numerics_class: "n".to_owned(),
            format: "bf16".to_owned(),
            page_tokens: 16,
            layers: 5,
            drafts: true,
        }
    }

    fn others() -> Vec<(&'static str, wire::PageForm)> {
        let text = || "other".to_owned();
        vec![
            (
                "model_digest",
                wire::PageForm {
                    model_digest: text(),
                    ..form()
                },
            ),
            (
                "numerics_class",
                wire::PageForm {
                    numerics_class: text(),
                    ..form()
                },
            ),
            (
                "format",
                wire::PageForm {
                    format: text(),
                    ..form()
                },
            ),
            (
                "page_tokens",
                wire::PageForm {
                    page_tokens: 17,
                    ..form()
                },
            ),
            (
                "layers",
                wire::PageForm {
                    layers: 6,
                    ..form()
                },
            ),
        ]
    }

    #[test]
    fn nodes_whose_pages_differ_say_in_what() {
        assert!(agree(&form(), &form()).is_ok());
        for (field, other) in others() {
            let refused = agree(&form(), &other).unwrap_err();
            assert_eq!(refused.code(), Code::FailedPrecondition);
            assert!(refused.message().contains(field), "{refused}");
        }
        let plain = wire::PageForm {
            drafts: false,
            ..form()
        };
        assert!(agree(&form(), &plain).is_ok(), "a layer may be left out");
        assert!(agree(&plain, &form()).is_err(), "but not made up");
    }

    #[test]
    fn a_digest_covers_all_that_the_bits_depend_on() {
        let all = digest(&form(), 7, b"page");
        assert_eq!(all, digest(&form(), 7, b"page"));
        assert_ne!(all, digest(&form(), 7, b"pagf"));
        assert_ne!(all, digest(&form(), 8, b"page"));
        for (field, other) in others() {
            assert_ne!(all, digest(&other, 7, b"page"), "{field}");
        }
    }
}
