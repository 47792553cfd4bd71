//! An expert that comes as a blob, piece by piece.
//!
//! Secret: what has been looked at already. Every piece is copied, hashed and checked when it comes, so that no
//! large piece of work is left for the end; nothing is an expert before all of it has passed. This module does not
//! know where pieces come from.

use std::ops::Range;

use super::layout::{HEADER, Layout, NAMES};
use super::{Expert, Memory, Source, expected};
use crate::checkpoint::{Dtype, Stored, TensorView, manifest};
use crate::weights::{Blob, Format};
use crate::{Checkpoint, ModelError};

/// A blob that is not complete yet.
///
/// Any bytes may be given: the header must be exactly that of this expert of this model in this dtype, the length
/// must follow from it, the padding must be zero and every value finite. Where a manifest lists the tensors and they
/// are in memory as they are stored, their digests must be the listed ones.
#[derive(Debug)]
pub struct Arriving {
    layer: usize,
    expert: usize,
    layout: Layout,
    blob: Blob,
    hasher: blake3::Hasher,
    /// Name and digest of the tensor that all of it is, where a manifest lists that.
    listed: Option<(String, blake3::Hash)>,
    /// Those that are not complete yet, the next one last.
    sections: Vec<Section>,
}

/// What a section holds.
#[derive(Debug)]
enum Content {
    /// Elements of a matrix, and how many of them have been looked at.
    Data(Stored, usize),
    /// Scales of data in this format.
    Scales(Format),
}

#[derive(Debug)]
struct Section {
    range: Range<usize>,
    matrix: &'static str,
    content: Content,
    /// The tensor and its digest, where a manifest lists these bytes, and the digest so far.
    listed: Option<(String, blake3::Hash, blake3::Hasher)>,
}

impl Arriving {
    /// Nothing of it is here yet.
    ///
    /// # Errors
    /// As [`Expert::load`] where the model has no such expert.
    pub fn new(
        ckpt: &Checkpoint,
        layer: usize,
        expert: usize,
        dtype: Dtype,
    ) -> Result<Arriving, ModelError> {
        let layout = expected(ckpt, layer, expert, dtype)?;
        let source = Source::find(ckpt, layer, expert)?;
        let listed = |view: &TensorView<'_>| {
            let listed = view.listed()?;
            Some((view.name().to_owned(), listed, blake3::Hasher::new()))
        };
        let mut sections = Vec::new();
        for (i, (m, matrix)) in layout.matrices.iter().zip(NAMES).enumerate() {
            // Bytes as they are stored are bytes that the manifest lists.
            let (data, scales) = match &source {
                Source::Matrices(views) if views[i].dtype() == m.format.stored() => {
                    let scales = views[i].scales()?;
                    (listed(&views[i]), scales.as_ref().and_then(listed))
                }
                Source::Matrices(_) | Source::Blob(_) => (None, None),
            };
            sections.push(Section {
                range: m.data.clone(),
                matrix,
                content: Content::Data(m.format.stored(), 0),
                listed: data,
            });
            sections.push(Section {
                range: m.scales.clone(),
                matrix,
                content: Content::Scales(m.format),
                listed: scales,
            });
        }
        sections.retain(|section| !section.range.is_empty());
        sections.reverse();
        Ok(Arriving {
            layer,
            expert,
            blob: Blob::with_room(layout.len),
            layout,
            hasher: blake3::Hasher::new(),
            listed: match &source {
                Source::Blob(view) => Some(view.name().to_owned()).zip(view.listed()),
                Source::Matrices(_) => None,
            },
            sections,
        })
    }

    /// Takes the bytes behind those that have come.
    ///
    /// # Errors
    /// [`ModelError::Blob`] with the field or matrix that is wrong: this will never be the expert.
    pub fn take(&mut self, piece: &[u8]) -> Result<(), ModelError> {
        self.checked(piece).map_err(|reason| self.bad(reason))
    }

    fn checked(&mut self, piece: &[u8]) -> Result<(), String> {
        let before = self.blob.as_ref().len();
        let (len, expected) = (before.saturating_add(piece.len()), self.layout.len);
        if len > expected || !self.blob.push(piece) {
            self.check_header(before, piece)?;
            return Err(format!("its length is {len} at least, not {expected}"));
        }
        self.hasher.update(piece);
        self.check_header(before, &[])?;
        let bytes = self.blob.as_ref();
        while let Some(section) = self.sections.last_mut() {
            section.look(before, bytes)?;
            if section.range.end > len {
                break;
            }
            self.sections.pop();
        }
        Ok(())
    }

    /// Looks at the header when it has just come; `more` is behind what is in memory.
    fn check_header(&self, before: usize, more: &[u8]) -> Result<(), String> {
        if before >= HEADER {
            return Ok(());
        }
        let come = self.blob.as_ref().iter().chain(more).copied();
        let header: Vec<u8> = come.take(HEADER).collect();
        match header.first_chunk() {
            Some(header) => self.layout.expect(&Layout::parse(header)?),
            None => Ok(()),
        }
    }

    /// BLAKE3 of what has come.
    pub fn digest(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }

    /// It is complete.
    ///
    /// # Errors
    /// Something is missing, or the padding is not zero.
    pub fn finish(self) -> Result<Expert, ModelError> {
        let (len, expected) = (self.blob.as_ref().len(), self.layout.len);
        if len < HEADER {
            let reason = format!("{len} bytes, less than the {HEADER} of the header");
            return Err(self.bad(reason));
        }
        if len != expected {
            return Err(self.bad(format!("its length is {len}, not {expected}")));
        }
        if let Err(reason) = self.layout.check_padding(self.blob.as_ref()) {
            return Err(self.bad(reason));
        }
        let digest = self.digest();
        match &self.listed {
            Some((tensor, listed)) if listed.as_bytes() != &digest => {
                let list = manifest::FILE;
                return Err(self.bad(format!("`{tensor}` is not what {list} lists")));
            }
            _ => {}
        }
        Ok(Expert {
            digest,
            memory: Memory::Owned(self.blob),
            layout: self.layout,
        })
    }

    fn bad(&self, reason: String) -> ModelError {
        ModelError::Blob {
            layer: self.layer,
            expert: self.expert,
            reason,
        }
    }
}

impl Section {
    /// Looks at what `bytes`, the blob so far, has of it since it was `before` long.
    fn look(&mut self, before: usize, bytes: &[u8]) -> Result<(), String> {
        let Range { start, end } = self.range;
        let come = bytes.len().min(end);
        if come <= start {
            return Ok(());
        }
        if let Some((_, _, hasher)) = &mut self.listed {
            hasher.update(&bytes[before.max(start)..come]);
        }
        let matrix = self.matrix;
        match &mut self.content {
            Content::Data(stored, seen) => {
                // An element may come in two pieces.
                let whole = (come - start) / stored.bytes();
                let new = start + *seen * stored.bytes()..start + whole * stored.bytes();
                if let Some(at) = stored.first_not_finite(&bytes[new]) {
                    let at = *seen + at;
                    return Err(format!("{matrix}: element {at} is not a finite number"));
                }
                *seen = whole;
            }
            Content::Scales(format) if come == end => {
                if let Some(at) = format.odd_scale(&bytes[start..end]) {
                    return Err(format!("{matrix}: scale {at} is too large for a scale"));
                }
            }
            Content::Scales(_) => {}
        }
        match &self.listed {
            Some((tensor, listed, hasher)) if come == end && hasher.finalize() != *listed => {
                let list = manifest::FILE;
                Err(format!("`{tensor}` is not what {list} lists"))
            }
            _ => Ok(()),
        }
    }
}
