//! What one scheduler may hand out, and why a request is turned away. Secret: which limits contradict
//! each other.

use std::time::Duration;

/// What one scheduler may hand out. All counts, no bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Requests that hold pages at the same time.
    pub max_running: usize,
    /// Requests that wait for admission; one more is refused.
    pub max_waiting: usize,
    /// Prompt tokens of the requests that wait, together; a request that would be over is refused,
    /// unless nobody else waits.
    pub max_waiting_tokens: usize,
    /// A request that is expected to wait longer for its first row is refused; None: however long.
    pub max_wait: Option<Duration>,
    /// Rows of one step, prefill, decode and drafts together.
    pub max_step_tokens: usize,
    /// Time that a step should take at most while anybody decodes: prefill is cut into chunks that
    /// keep to it. None: only `max_step_tokens` counts.
    pub itl_target: Option<Duration>,
    /// Tokens drafted after each token of output at most; 0: none.
    pub drafts: usize,
    /// Whether pages are known by their contents and shared.
    pub prefix_cache: bool,
    /// Positions of one KV page.
    pub page_tokens: usize,
    /// KV pages in all.
    pub pages: usize,
    /// Positions of one request, prompt and output together.
    pub max_context: usize,
}

impl Default for Limits {
    /// One page of one position: whoever makes limits says how many there are.
    fn default() -> Self {
        Self {
            max_running: 1,
            max_waiting: 1,
            max_waiting_tokens: usize::MAX,
            max_wait: None,
            max_step_tokens: 1,
            itl_target: None,
            drafts: 0,
            prefix_cache: true,
            page_tokens: 1,
            pages: 1,
            max_context: 1,
        }
    }
}

impl Limits {
    /// Checks that the limits can serve anything at all.
    ///
    /// # Errors
    /// Names the limit that is zero, too large for a page number, or that would let a decode
    /// row wait behind others (`max_step_tokens` below `max_running`).
    pub fn validate(&self) -> Result<(), InvalidLimits> {
        let positive = [
            ("max_running", self.max_running),
            ("max_waiting", self.max_waiting),
            ("max_waiting_tokens", self.max_waiting_tokens),
            ("max_step_tokens", self.max_step_tokens),
            ("page_tokens", self.page_tokens),
            ("pages", self.pages),
            ("max_context", self.max_context),
        ];
        for (limit, value) in positive {
            if value == 0 {
                return Err(InvalidLimits::Zero { limit });
            }
        }
        if u32::try_from(self.pages).is_err() {
            return Err(InvalidLimits::TooManyPages { pages: self.pages });
        }
        if self.max_step_tokens < self.max_running {
            return Err(InvalidLimits::StepTooSmall {
                max_step_tokens: self.max_step_tokens,
                max_running: self.max_running,
            });
        }
        Ok(())
    }

    /// The most positions (prompt and output) that one request can ever be given.
    pub fn longest_request(&self) -> usize {
        self.max_context
            .min(self.pages.saturating_mul(self.page_tokens))
    }

    pub(super) fn pages_for(&self, positions: usize) -> usize {
        positions.div_ceil(self.page_tokens)
    }

    /// Whether the request can ever run here.
    pub(super) fn check(&self, prompt: usize, max_tokens: usize) -> Result<(), Invalid> {
        if prompt == 0 {
            return Err(Invalid::EmptyPrompt);
        }
        let positions = prompt.saturating_add(max_tokens);
        if positions > self.max_context {
            return Err(Invalid::TooLong {
                prompt,
                max_tokens,
                max_context: self.max_context,
            });
        }
        let needed = self.pages_for(positions);
        if needed > self.pages {
            return Err(Invalid::TooLarge {
                needed,
                pages: self.pages,
            });
        }
        Ok(())
    }
}

/// Limits that contradict themselves.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLimits {
    /// A limit of zero serves nothing.
    #[error("{limit} is 0; it must be at least 1")]
    Zero {
        /// Name of the limit.
        limit: &'static str,
    },
    /// Page numbers are 32 bits wide.
    #[error(
        "pages is {pages}, more than a 32-bit page number can name; use larger pages or less KV memory"
    )]
    TooManyPages {
        /// The number asked for.
        pages: usize,
    },
    /// Decode rows would have to wait for each other.
    #[error(
        "max_step_tokens is {max_step_tokens}, less than max_running {max_running}: raise the first or lower the second"
    )]
    StepTooSmall {
        /// Rows of a step.
        max_step_tokens: usize,
        /// Requests that may each need a decode row in it.
        max_running: usize,
    },
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing is wrong with the request: try again later.
    #[error("the queue is full ({waiting} requests wait); retry in {retry_after:?}")]
    Overloaded {
        /// Requests waiting now.
        waiting: usize,
        /// When it is likely to be taken.
        retry_after: Duration,
    },
    /// It would be taken, but would wait longer than it, or this node, allows.
    #[error("about {expected:?} of waiting are ahead; retry in {retry_after:?}")]
    TooLate {
        /// The wait that is expected.
        expected: Duration,
        /// When the wait is likely to be short enough.
        retry_after: Duration,
    },
    /// The request can never run here.
    #[error("{0}")]
    Invalid(Invalid),
}

/// What makes a request impossible to run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// There is no row to compute.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Prompt and output do not fit the model's context.
    #[error(
        "{prompt} prompt tokens and {max_tokens} output tokens exceed the context of {max_context}"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Output tokens asked for.
        max_tokens: usize,
        /// The limit.
        max_context: usize,
    },
    /// Prompt and output do not fit the KV memory of this node, even when it is empty.
    #[error(
        "{needed} KV pages are needed, this node has {pages} in all: shorten the request or give the node more KV memory"
    )]
    TooLarge {
        /// Pages for prompt and output.
        needed: usize,
        /// Pages of the node.
        pages: usize,
    },
    /// The identifier is in use.
    #[error("request {id} is already here")]
    Duplicate {
        /// The identifier.
        id: u64,
    },
}
