//! Constrained output: what a request says of its text, as a mask over tokens before each draw.
//!
//! Secret: when the grammar's work is done. Grammars are compiled beside the async threads and kept
//! for those who ask for the same; the mask of the next token is worked out by threads of their own
//! while the step that needs it is under way, so that the step loop only waits for one that takes
//! longer than a step. The state of a text is a function of its tokens: a stream that goes on here
//! pushes what it has said elsewhere. The tokenizer is read from the checkpoint when the first such
//! request comes; all others need none.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use guild_model::Config;
use guild_model::grammar::{Allowed, Form, Grammar, GrammarError, Grammars, Sentence};
use guild_model::text::Text;
use guild_node::status;
use guild_proto::inference::v1 as wire;
use guild_proto::inference::v1::constraint::Form as WireForm;
use tokio::sync::{OnceCell, Semaphore};
use tonic::{Code, Status};

use crate::sequence;

/// Compiled grammars that are kept; of those not asked for lately the oldest goes.
pub const KEPT_GRAMMARS: usize = 64;
/// Grammars that are compiled at the same time.
const COMPILERS: usize = 2;
/// Threads that work out masks: one for each processor, but no fewer and no more than these.
const MASKERS: (usize, usize) = (2, 8);

/// Where the checkpoint's tokenizer comes from; None when there is none.
pub type LoadText = Arc<dyn Fn() -> Result<Option<Arc<Text>>, String> + Send + Sync>;

type Compiled = Result<Arc<Grammar>, GrammarError>;
type Job = Box<dyn FnOnce() + Send>;

/// Makes constraints of what requests ask for.
pub(crate) struct Constraints {
    config: Arc<Config>,
    load: LoadText,
    grammars: OnceCell<Result<Arc<Grammars>, String>>,
    kept: Mutex<VecDeque<(Form, Arc<OnceCell<Compiled>>)>>,
    compilers: Semaphore,
    maskers: Maskers,
}

impl std::fmt::Debug for Constraints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraints").finish_non_exhaustive()
    }
}

impl Constraints {
    pub(crate) fn new(config: Arc<Config>, load: LoadText) -> Constraints {
        Constraints {
            config,
            load,
            grammars: OnceCell::new(),
            kept: Mutex::default(),
            compilers: Semaphore::new(COMPILERS),
            maskers: Maskers::default(),
        }
    }

    /// The constraint of a request that has said `said` already.
    ///
    /// # Errors
    /// There is no such grammar, or this checkpoint has no tokenizer to read it by.
    pub(crate) async fn prepare(
        &self,
        asked: &wire::Constraint,
        said: &[u32],
    ) -> Result<Box<dyn sequence::Constraint>, Status> {
        let (field, form) = form_of(asked)?;
        let field = format!("sampling.constraint.{field}");
        let invalid = |e: GrammarError| status::invalid(&field, e.to_string());
        form.check().map_err(invalid)?;
        if let Some(token) = asked.after_token
            && token as usize >= self.config.vocab_size
        {
            let text = format!(
                "id {token} is not below the vocabulary size {}",
                self.config.vocab_size
            );
            return Err(status::invalid("sampling.constraint.after_token", text));
        }
        let grammar = self.compiled(form).await?.map_err(invalid)?;
        let (after, said) = (asked.after_token, said.to_vec());
        let maskers = self.maskers.clone();
        // Pushing a long text is work, too.
        let begun = tokio::task::spawn_blocking(move || {
            let begin = Box::new(grammar.begin());
            let mut mask = Mask {
                sentence: match after {
                    Some(_) => State::Free(begin),
                    None => State::Bound(begin),
                },
                after,
                maskers,
            };
            said.into_iter().try_for_each(|token| mask.take(token))?;
            mask.look_ahead();
            Ok::<_, String>(mask)
        });
        match begun.await {
            Ok(Ok(mask)) => Ok(Box::new(mask)),
            Ok(Err(reason)) => Err(status::invalid(&field, reason)),
            Err(e) => Err(Status::internal(format!(
                "a constraint was not prepared: {e}"
            ))),
        }
    }

    /// The grammar, compiled once for all who ask for it at the same time.
    async fn compiled(&self, form: Form) -> Result<Compiled, Status> {
        let cell = self.kept(&form);
        let grammars = self.grammars().await?;
        let compile = async {
            let Ok(_permit) = self.compilers.acquire().await else {
                return Err(Status::internal("the compilers of grammars are gone"));
            };
            let compiled =
                tokio::task::spawn_blocking(move || grammars.compile(&form).map(Arc::new));
            compiled
                .await
                .map_err(|e| Status::internal(format!("a grammar was not compiled: {e}")))
        };
        cell.get_or_try_init(|| compile).await.cloned()
    }

    /// The place of a grammar among those that are kept.
    fn kept(&self, form: &Form) -> Arc<OnceCell<Compiled>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept.iter().position(|(known, _)| known == form);
        let entry = match known.and_then(|at| kept.remove(at)) {
            Some(entry) => entry,
            None => (form.clone(), Arc::default()),
        };
        let cell = Arc::clone(&entry.1);
        kept.push_front(entry);
        kept.truncate(KEPT_GRAMMARS);
        cell
    }

    /// Reads the tokenizer, once.
    pub(crate) async fn grammars(&self) -> Result<Arc<Grammars>, Status> {
        let read = || {
            let (config, load) = (Arc::clone(&self.config), Arc::clone(&self.load));
            let read = move || {
                let text = load()?.ok_or("the checkpoint has no tokenizer.json, so that its output cannot be constrained")?;
                Grammars::new(&text, &config)
                    .map(Arc::new)
                    .map_err(|e| e.to_string())
            };
            async {
                tokio::task::spawn_blocking(read)
                    .await
                    .unwrap_or_else(|e| Err(e.to_string()))
            }
        };
        let read = self.grammars.get_or_init(read).await.clone();
        read.map_err(|reason| {
            let field = [("field", "sampling.constraint".to_owned())];
            status::with_reason(Code::FailedPrecondition, "NO_CONSTRAINT", reason, field)
        })
    }
}

/// What is asked for, and in which field.
fn form_of(asked: &wire::Constraint) -> Result<(&'static str, Form), Status> {
    match &asked.form {
        Some(WireForm::JsonSchema(schema)) => Ok(("json_schema", Form::JsonSchema(schema.clone()))),
        Some(WireForm::JsonObject(true)) => Ok(("json_object", Form::JsonObject)),
        Some(WireForm::JsonObject(false)) => Err(status::invalid(
            "sampling.constraint.json_object",
            "true, or absent",
        )),
        Some(WireForm::Regex(regex)) => Ok(("regex", Form::Regex(regex.clone()))),
        Some(WireForm::Grammar(lark)) => Ok(("grammar", Form::Lark(lark.clone()))),
        Some(WireForm::Choice(choice)) => Ok(("choice", Form::Choice(choice.texts.clone()))),
        None => Err(status::invalid(
            "sampling.constraint",
            "it says nothing of the output",
        )),
    }
}

/// The constraint of one request.
#[derive(Debug)]
struct Mask {
    sentence: State,
    /// The token that the bound part begins behind.
    after: Option<u32>,
    maskers: Maskers,
}

#[derive(Debug)]
enum State {
    /// Nothing is bound yet.
    Free(Box<Sentence>),
    /// Bound, and nobody works on the next mask.
    Bound(Box<Sentence>),
    /// Somebody does.
    Away(mpsc::Receiver<(Box<Sentence>, Result<Allowed, GrammarError>)>),
    /// The next mask is here.
    Ready(Box<Sentence>, Allowed),
    /// It has failed.
    Broken(String),
}

impl Mask {
    /// Takes note of a token without a thought of the next.
    fn take(&mut self, token: u32) -> Result<(), String> {
        match std::mem::replace(
            &mut self.sentence,
            State::Broken("it has failed before".into()),
        ) {
            State::Free(sentence) if self.after == Some(token) => {
                self.sentence = State::Bound(sentence)
            }
            State::Free(sentence) => self.sentence = State::Free(sentence),
            State::Bound(mut sentence) | State::Ready(mut sentence, _) => {
                sentence.push(token).map_err(|e| e.to_string())?;
                self.sentence = State::Bound(sentence);
            }
            State::Away(away) => {
                let (mut sentence, _) = away.recv().map_err(|_| gone())?;
                sentence.push(token).map_err(|e| e.to_string())?;
                self.sentence = State::Bound(sentence);
            }
            State::Broken(reason) => return Err(reason),
        }
        Ok(())
    }

    /// Sends the sentence away to learn what may be next.
    fn look_ahead(&mut self) {
        match std::mem::replace(&mut self.sentence, State::Broken(gone())) {
            State::Bound(mut sentence) => {
                let (answer, away) = mpsc::sync_channel(1);
                self.sentence = State::Away(away);
                self.maskers.run(Box::new(move || {
                    let allowed = sentence.allowed();
                    // Nobody waits for it when the request has ended.
                    let _ = answer.send((sentence, allowed));
                }));
            }
            other => self.sentence = other,
        }
    }

    /// Waits for what may be next, if anything is bound.
    fn allowed(&mut self) -> Result<Option<&Allowed>, String> {
        if let State::Away(away) = &self.sentence {
            self.sentence = match away.recv() {
                Ok((sentence, Ok(allowed))) => State::Ready(sentence, allowed),
                Ok((_, Err(reason))) => State::Broken(reason.to_string()),
                Err(_) => State::Broken(gone()),
            };
        }
        match &self.sentence {
            State::Free(_) => Ok(None),
            State::Ready(_, allowed) => Ok(Some(allowed)),
            State::Bound(_) | State::Away(_) => Err(gone()),
            State::Broken(reason) => Err(reason.clone()),
        }
    }
}

fn gone() -> String {
    "the thread that works out masks has failed".to_owned()
}

impl sequence::Constraint for Mask {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        if let Some(allowed) = self.allowed()? {
            allowed.mask(logits);
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        self.take(token)?;
        self.look_ahead();
        Ok(())
    }
}

/// Threads for masks, started when first needed. They end with the last that can ask them.
#[derive(Clone, Default)]
struct Maskers(Arc<Mutex<Option<mpsc::Sender<Job>>>>);

impl std::fmt::Debug for Maskers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maskers").finish_non_exhaustive()
    }
}

impl Maskers {
    /// Runs it soon, here and now where there is no thread for it.
    fn run(&self, job: Job) {
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = jobs.get_or_insert_with(start);
        if let Err(mpsc::SendError(job)) = sender.send(job) {
            drop(jobs);
            job();
        }
    }
}

fn start() -> mpsc::Sender<Job> {
    let (sender, receiver) = mpsc::channel::<Job>();
    let receiver = Arc::new(Mutex::new(receiver));
    let (least, most) = MASKERS;
    let processors = thread::available_parallelism().map_or(least, usize::from);
    for index in 0..processors.clamp(least, most) {
        let receiver = Arc::clone(&receiver);
        let work = move || {
            loop {
                let job = receiver
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .recv();
                match job {
                    Ok(job) => job(),
                    Err(_) => return,
                }
            }
        };
        if let Err(e) = thread::Builder::new()
            .name(format!("masks-{index}"))
            .spawn(work)
        {
            tracing::warn!("a thread for masks was not started: {e}");
        }
    }
    sender
}
