//! What a request does to logits before a token is chosen from them: bias and penalties.
//!
//! Secret: which tokens count. Repetition counts prompt and output, presence and frequency the output alone, as
//! OpenAI and vLLM define them. It is a function of the sequence's tokens and of where its output begins, so a stream
//! that goes on elsewhere is shaped as it was.

use std::collections::{HashMap, HashSet};

/// Changes to logits; neutral by default.
#[derive(Debug, Clone, PartialEq)]
pub struct Shaping {
    /// Added to the logits of these tokens. Ids past the end of the vocabulary are ignored.
    pub bias: Vec<(u32, f32)>,
    /// The logit of a token of prompt or output is divided by it where positive, else multiplied; 1 is neutral.
    pub repetition: f32,
    /// Taken off the logit of a token of the output.
    pub presence: f32,
    /// Taken off the logit of a token of the output as often as it is there.
    pub frequency: f32,
}

impl Default for Shaping {
    fn default() -> Self {
        Self {
            bias: Vec::new(),
            repetition: 1.0,
            presence: 0.0,
            frequency: 0.0,
        }
    }
}

/// The tokens of a sequence, as penalties count them.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    prompt: HashSet<u32>,
    output: HashMap<u32, u32>,
}

impl Seen {
    /// A sequence whose first `prompt` tokens are its prompt, the others its output.
    pub fn new(tokens: &[u32], prompt: usize) -> Seen {
        let (prompt, output) = tokens.split_at(prompt.min(tokens.len()));
        let mut seen = Seen {
            prompt: prompt.iter().copied().collect(),
            output: HashMap::new(),
        };
        output.iter().for_each(|&token| seen.push(token));
        seen
    }

    /// One more token of output.
    pub fn push(&mut self, token: u32) {
        *self.output.entry(token).or_default() += 1;
    }
}

impl Shaping {
    /// Whether no logit is changed, whatever the sequence.
    pub fn is_neutral(&self) -> bool {
        self.bias.is_empty() && !self.counts()
    }

    /// Whether it matters which tokens a sequence has.
    pub fn counts(&self) -> bool {
        self.repetition != 1.0 || self.presence != 0.0 || self.frequency != 0.0
    }

    /// Shapes logits `[vocab]`: bias, then repetition, then frequency and presence.
    pub fn apply(&self, logits: &mut [f32], seen: &Seen) {
        for &(token, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if self.repetition != 1.0 {
            let prompt = seen.prompt.iter();
            let further = seen
                .output
                .keys()
                .filter(|token| !seen.prompt.contains(token));
            for &token in prompt.chain(further) {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = match *logit > 0.0 {
                        true => *logit / self.repetition,
                        false => *logit * self.repetition,
                    };
                }
            }
        }
        for (&token, &times) in &seen.output {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= self.frequency * times as f32;
                *logit -= self.presence;
            }
        }
    }
}
