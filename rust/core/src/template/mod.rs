//! A chat template: a conversation to the very text that Transformers renders.
//!
//! The model's own Jinja source is compiled once. [`ChatTemplate::render`] is what
//! `apply_chat_template(tokenize=False)` gives; [`ChatTemplate::render_segments`] also says which
//! bytes of it are trained (see [`spans`](self)).

mod compiled;
mod contents;
mod controls;
mod ends;
mod expression;
mod filters;
mod filters_of_numbers;
mod filters_of_texts;
mod format;
mod fuel;
mod json;
mod lazy;
mod literals;
mod marks;
mod methods;
mod operators;
mod order;
mod pieces;
mod print;
mod probes;
mod python;
mod rendered;
mod rewriter;
mod spans;
mod starts;
mod statement;
mod stops;
mod tags;
mod texts;
mod tokens;

use std::sync::{Arc, RwLock};

use aho_corasick::{AhoCorasick, MatchKind};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind as JinjaErrorKind, Value};
use serde_json::{Map, Value as Json};

use crate::conversation::{Conversation, Message, VERBATIM_CALL};
use crate::{Error, ErrorKind, Result};

pub use compiled::CompiledForm;
pub use controls::{Controls, OnLostContent, Reasoning, TrainOn, TrainOnEos};
use pieces::Marker;
use probes::Probes;
pub use probes::{TurnEnd, TurnEnds};
pub use rendered::{Endless, Lost, Part, Rendered, Segment};
use stops::TokenFinder;

const PLAIN: &str = "chat template";
const TAGGED: &str = "chat template with generation marks";
/// Sets of arguments whose probes are kept; those of further ones are made anew for each row.
const MAX_PROBED: usize = 64;

/// The names of reasoning beside content, the standard one first.
const REASONING_KEYS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The special tokens a template may read, and those that may close a turn.
#[derive(Debug, Clone, Default)]
pub struct SpecialTokens {
    /// `bos_token`, `eos_token`, … → its text.
    pub named: Vec<(String, String)>,
    /// Texts of all control tokens of the tokenizer.
    pub texts: Vec<String>,
    /// Those at which generation ends (`eos_token_id` of the model's configuration), beside `eos_token`.
    pub eos: Vec<String>,
}

/// Arguments of a template, and what probes found with them.
type Probed = (Map<String, Json>, Arc<Probes>);

/// A compiled chat template.
#[expect(clippy::struct_excessive_bools, reason = "what a template can do, each by itself")]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: SpecialTokens,
    source: String,
    /// The source has `{% generation %}` tags.
    tagged: bool,
    /// What the template reads: whether tool schemas and tool calls can reach the text at all.
    renders_tools: bool,
    renders_tool_calls: bool,
    /// Whether it takes content as a list of parts; others get the text of the parts.
    renders_parts: bool,
    /// Tags that the template may look for in a content.
    tags: AhoCorasick,
    tokens: TokenFinder,
    /// How turns open and close, by the arguments of rows; the first without any.
    probed: RwLock<Vec<Probed>>,
    /// Shapes of conversations that need no Jinja any more.
    compiled: compiled::Forms,
}

impl ChatTemplate {
    /// Compiles `source` and probes how it opens and closes an assistant turn.
    pub fn new(source: &str, special_tokens: SpecialTokens) -> Result<Self> {
        check_markup(source)?;
        let tagged = tags::has_generation_tag(source);
        let mut environment = new_environment()?;
        let mut add = |name: &'static str, text: String| {
            environment.add_template_owned(name, text).map_err(|error| compile_error(&error))
        };
        let rewritten = python::rewrite(source).map_err(|reason| {
            Error::new(ErrorKind::Template, format!("the chat template does not compile: {reason}"))
        })?;
        add(PLAIN, tags::replace_generation_tags(&rewritten, false))?;
        if tagged {
            add(TAGGED, tags::replace_generation_tags(&rewritten, true))?;
        }
        let mut template = Self {
            environment,
            tokens: TokenFinder::new(&special_tokens),
            special_tokens,
            source: source.to_owned(),
            tagged,
            renders_tools: source.contains("tools"),
            renders_tool_calls: source.contains("tool_calls"),
            renders_parts: true,
            tags: tags_of(source)?,
            probed: RwLock::default(),
            compiled: compiled::Forms::default(),
        };
        template.renders_parts = template.probe_parts();
        Ok(template)
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// What closes an assistant turn, where the template writes something; with `kwargs` as its arguments.
    pub fn turn_ends(&self, kwargs: &Map<String, Json>) -> TurnEnds {
        self.probes(kwargs).ends.clone()
    }

    /// What a generation prompt adds to a conversation that ends with a question; with `kwargs` as its arguments.
    pub fn generation_prompt(&self, kwargs: &Map<String, Json>) -> String {
        self.probes(kwargs).generation_prompt.clone()
    }

    /// How turns open and close with `kwargs` as the template's arguments.
    fn probes(&self, kwargs: &Map<String, Json>) -> Arc<Probes> {
        let find = |known: &[Probed]| {
            known.iter().find(|(arguments, _)| arguments == kwargs).map(|(_, probes)| probes.clone())
        };
        if let Some(probes) = self.probed.read().ok().and_then(|known| find(&known)) {
            return probes;
        }
        let probes = Arc::new(self.probe(kwargs));
        if let Ok(mut known) = self.probed.write()
            && known.len() < MAX_PROBED
        {
            known.push((kwargs.clone(), probes.clone()));
        }
        probes
    }

    /// Whether `{% generation %}` tags in the source say what is trained.
    pub fn is_tagged(&self) -> bool {
        self.tagged
    }

    /// Whether tool schemas of a row reach the text.
    pub fn renders_tools(&self) -> bool {
        self.renders_tools
    }

    /// The text of `conversation`, as `apply_chat_template(tokenize=False)` gives it.
    pub fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<String> {
        self.render_messages(&conversation.messages, conversation, add_generation_prompt)
    }

    /// Renders `conversation` and says which bytes are trained: by the compiled form where there is one
    /// for it, else by Jinja.
    pub fn render_segments(&self, conversation: &Conversation, controls: &Controls) -> Result<Rendered> {
        match self.compiled.render(self, conversation, controls) {
            Some(rendered) => Ok(rendered),
            None => self.follow(conversation, controls).map(|found| found.into_rendered(controls)),
        }
    }

    /// What the compiled form is good for under `controls`.
    pub fn compiled_form(&self, controls: &Controls) -> CompiledForm {
        self.compiled.describe(self, controls)
    }

    fn render_messages(
        &self,
        messages: &[Message],
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let values = messages.iter().map(|message| self.message_value(message, None));
        self.render_values(PLAIN, values.collect(), conversation, add_generation_prompt)
    }

    fn render_values(
        &self,
        name: &str,
        messages: Vec<Value>,
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let context = self.context(messages, conversation, add_generation_prompt);
        match fuel::of(conversation) {
            fuel::FUEL => Self::render_by(&self.environment, name, context),
            fuel => Self::render_by(&self.with_fuel(fuel), name, context),
        }
    }

    /// What the template may name.
    fn context(
        &self,
        messages: Vec<Value>,
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> Value {
        let mut context: Vec<(&str, Value)> = vec![
            ("messages", Value::from(messages)),
            ("tools", conversation.tools.as_ref().map_or(Value::from(()), to_jinja)),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        context
            .extend(self.special_tokens.named.iter().map(|(name, text)| (name.as_str(), Value::from(text))));
        context.extend(
            conversation.chat_template_kwargs.iter().map(|(name, value)| (name.as_str(), to_jinja(value))),
        );
        Value::from_pairs(context)
    }

    fn render_by(environment: &Environment<'_>, name: &str, context: Value) -> Result<String> {
        let template = environment.get_template(name).map_err(|error| compile_error(&error))?;
        template.render(context).map_err(|error| render_error(&error))
    }

    /// The environment, where a render may do so much work.
    fn with_fuel(&self, fuel: u64) -> Environment<'static> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        environment
    }

    /// Whether a render of `conversation` takes so little that a compiled form may be sought by hundreds of them.
    fn is_cheap(&self, conversation: &Conversation) -> bool {
        let environment = self.with_fuel(fuel::PROBE_FUEL);
        let values = conversation.messages.iter().map(|message| self.message_value(message, None)).collect();
        Self::render_by(&environment, PLAIN, self.context(values, conversation, false)).is_ok()
    }

    /// A message as the template sees it, with marks round what it says. Reasoning is given under all of its
    /// names, as Transformers does.
    fn message_value(&self, message: &Message, mut marker: Option<&mut Marker>) -> Value {
        let lowered;
        let is_lowered = !self.renders_tool_calls && !message.tool_calls().is_empty();
        let content = if is_lowered {
            lowered = lower_tool_calls(message);
            Some(lowered.as_str())
        } else {
            message.content.as_deref()
        };
        // keys of a message that are null are left out, as Transformers does
        let content = content.map(|text| match (&message.parts, marker.as_mut()) {
            (Some(parts), marker) if self.renders_parts && !is_lowered => match marker {
                Some(marker) => marker.mark_parts(parts),
                None => Value::from(parts.iter().map(to_jinja).collect::<Vec<_>>()),
            },
            (_, None) => Value::from(text),
            (_, Some(marker)) => Value::from(marker.mark(text, Part::Content)),
        });
        let thought = REASONING_KEYS
            .into_iter()
            .find_map(|key| message.extra.get(key).filter(|value| !value.is_null()));
        let reasoning = thought.map(|value| match (value, marker.as_mut()) {
            (Json::String(text), Some(marker)) => Value::from(marker.mark(text, Part::Reasoning)),
            (value, _) => to_jinja(value),
        });
        let mut pairs = vec![("role", Value::from(message.role))];
        pairs.extend(content.map(|content| ("content", content)));
        if let Some(reasoning) = &reasoning {
            pairs.push(("thinking", reasoning.clone()));
        }
        let extra =
            message.extra.iter().filter(|(key, value)| key.as_str() != VERBATIM_CALL && !value.is_null());
        pairs.extend(extra.map(|(key, value)| {
            let value = match (key.as_str(), marker.as_mut(), &reasoning) {
                ("tool_calls", Some(marker), _) if !is_lowered => marker.mark_calls(value),
                (key, _, Some(reasoning)) if REASONING_KEYS.contains(&key) && Some(value) == thought => {
                    reasoning.clone()
                }
                _ => to_jinja(value),
            };
            (key.as_str(), value)
        }));
        if let Some(reasoning) = reasoning {
            pairs.push(("reasoning_content", reasoning));
        }
        Value::from_pairs(pairs)
    }

    /// Whether content as a list of parts shows as its text.
    fn probe_parts(&self) -> bool {
        let part = |text: &str| serde_json::json!({"type": "text", "text": text});
        let mut message = Message::new("user", "first probeprobe last");
        message.parts = Some(vec![part("first probe"), part("probe last")]);
        let conversation = Conversation { messages: vec![message], ..Conversation::default() };
        self.render(&conversation, false).is_ok_and(|text| {
            let at = (text.find("first probe"), text.find("probe last"));
            matches!(at, (Some(one), Some(two)) if one < two)
                && !text.contains("'text'")
                && !text.contains("\"text\"")
        })
    }
}

/// What cuts a content into stretches: tags that the template names, and those of thoughts.
fn tags_of(source: &str) -> Result<AhoCorasick> {
    let is_tag = |literal: &&str| {
        literal.len() > 2
            && (literal.starts_with('<') && literal.ends_with('>')
                || literal.starts_with('[') && literal.ends_with(']'))
            && !literal[1..].contains(['<', '['])
    };
    let literals = literals::string_literals(source);
    let tags = literals.iter().map(|literal| literal.trim()).filter(is_tag).chain(pieces::THOUGHT_TAGS);
    let finder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(tags);
    finder.map_err(|_| Error::new(ErrorKind::Template, "the chat template has too many string literals"))
}

/// Tool calls as text, for templates that have no place for them: as the row wrote them, else one
/// `{"name", "arguments"}` object a line.
fn lower_tool_calls(message: &Message) -> String {
    let mut lines: Vec<String> = message.content.iter().filter(|text| !text.is_empty()).cloned().collect();
    match message.extra.get(VERBATIM_CALL).and_then(Json::as_str) {
        Some(text) => lines.push(text.to_owned()),
        None => lines
            .extend(message.tool_calls().iter().map(|call| call.get("function").unwrap_or(call).to_string())),
    }
    lines.join("\n")
}

/// Jinja2 escapes what is added (`+`) to a text after `|safe`, so that `<` becomes `&lt;`; no other
/// engine does, and no author means it.
fn check_markup(source: &str) -> Result<()> {
    for (number, line) in (1..).zip(source.lines()) {
        let adds = line.match_indices("safe").any(|(at, word)| {
            let (before, after) = (line[..at].trim_end(), line[at + word.len()..].trim_start());
            before.ends_with('|') && after.starts_with('+')
        });
        if adds {
            return Err(Error::new(
                ErrorKind::Template,
                format!(
                    "the chat template does not compile: line {number}: it adds text to the result of |safe, which \
                     Transformers would render with HTML escapes (&lt; for <); remove the |safe"
                ),
            ));
        }
    }
    Ok(())
}

fn new_environment() -> Result<Environment<'static>> {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|error| compile_error(&error))?;
    // the date is read once, so that all rows of a run carry the same one
    let now = jiff::Zoned::now();
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    environment.set_fuel(Some(fuel::FUEL));
    environment.set_unknown_method_callback(python::unknown_method);
    environment.add_filter(python::EACH, python::each);
    environment.add_filter(python::KEEP, python::keep);
    environment.set_formatter(print::formatter);
    environment.add_filter(print::TEXT, print::text);
    environment.add_filter("string", print::text);
    environment.add_filter("join", print::join);
    environment.add_filter("lower", print::on_text(str::to_lowercase));
    environment.add_filter("upper", print::on_text(str::to_uppercase));
    environment.add_filter("format", format::filter);
    filters::add_to(&mut environment);
    operators::add_to(&mut environment);
    lazy::add_filters(&mut environment);
    environment.add_filter("tojson", json::tojson);
    environment.remove_global("debug");
    for name in ["cycler", "joiner", "lipsum", "self"] {
        environment.add_function(name, move || -> Result<Value, minijinja::Error> {
            Err(order::wrong(format!("`{name}` is not known here")))
        });
    }
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: &str| {
        jiff::fmt::strtime::format(format, &now)
            .map_err(|error| minijinja::Error::new(JinjaErrorKind::InvalidOperation, error.to_string()))
    });
    environment.add_test("callable", python::is_callable);
    environment.add_test("mapping", order::is_dict);
    environment.add_test("iterable", python::is_iterable);
    environment.add_test("sequence", python::is_sequence);
    Ok(environment)
}

fn to_jinja(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(on) => Value::from(*on),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(integer), _, _) => Value::from(integer),
            (None, Some(integer), _) => Value::from(integer),
            (None, None, float) => Value::from(float.unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from(items.iter().map(to_jinja).collect::<Vec<_>>()),
        Json::Object(object) => {
            Value::from_pairs(object.iter().map(|(key, item)| (key.as_str(), to_jinja(item))))
        }
    }
}

fn compile_error(error: &minijinja::Error) -> Error {
    let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
    let reason = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    Error::new(ErrorKind::Template, format!("the chat template does not compile: {line}{reason}"))
}

fn render_error(error: &minijinja::Error) -> Error {
    let line = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    if error.kind() == JinjaErrorKind::OutOfFuel {
        let message = format!(
            "the chat template does more work on this conversation than a render may{line}: it loops too long or makes \
             too much text; mend it, or choose another --template"
        );
        return Error::new(ErrorKind::Template, message);
    }
    let reason = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let message = match reason.strip_prefix(RAISED) {
        Some(words) => format!("the chat template refuses this conversation: {words}{line}"),
        None => format!("the chat template fails on this conversation: {reason}{line}"),
    };
    Error::new(ErrorKind::Template, message)
}

/// Marks an error that the template itself raised.
const RAISED: &str = "\u{0}raised ";

#[expect(clippy::needless_pass_by_value, reason = "minijinja hands over owned arguments")]
fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(JinjaErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}
