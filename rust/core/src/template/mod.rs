//! A chat template: a conversation to the very text that Transformers renders.
//!
//! The model's own Jinja source is compiled once. [`ChatTemplate::render`] is what
//! `apply_chat_template(tokenize=False)` gives; [`ChatTemplate::render_segments`] also says which
//! bytes of it are trained (see [`spans`](self)).

mod json;
mod spans;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind as JinjaErrorKind, Value};
use serde_json::Value as Json;

use crate::conversation::{Conversation, Message, VERBATIM_CALL};
use crate::{Error, ErrorKind, Result};

pub use spans::{Rendered, Segment};

const PLAIN: &str = "chat template";
const TAGGED: &str = "chat template with generation marks";

/// The special tokens a template may read, and those that may close a turn.
#[derive(Debug, Clone, Default)]
pub struct SpecialTokens {
    /// `bos_token`, `eos_token`, … → its text.
    pub named: Vec<(String, String)>,
    /// Texts of all control tokens of the tokenizer.
    pub texts: Vec<String>,
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: SpecialTokens,
    source: String,
    /// The source has `{% generation %}` tags.
    tagged: bool,
    /// What the template reads: whether tool schemas and tool calls can reach the text at all.
    renders_tools: bool,
    renders_tool_calls: bool,
    /// What a generation prompt adds to a conversation that ends with a user turn; empty where
    /// the template adds nothing or will not render the probe.
    generation_prompt: String,
    /// The control token that closes an assistant turn.
    turn_end: Option<String>,
}

impl ChatTemplate {
    /// Compiles `source` and probes how it opens and closes an assistant turn.
    pub fn new(source: &str, special_tokens: SpecialTokens) -> Result<Self> {
        let tagged = spans::has_generation_tag(source);
        let mut environment = new_environment()?;
        let mut add = |name: &'static str, text: String| {
            environment.add_template_owned(name, text).map_err(|error| compile_error(&error))
        };
        add(PLAIN, spans::replace_generation_tags(source, false))?;
        if tagged {
            add(TAGGED, spans::replace_generation_tags(source, true))?;
        }
        let mut template = Self {
            environment,
            special_tokens,
            source: source.to_owned(),
            tagged,
            renders_tools: source.contains("tools"),
            renders_tool_calls: source.contains("tool_calls"),
            generation_prompt: String::new(),
            turn_end: None,
        };
        template.probe();
        Ok(template)
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The control token that closes an assistant turn, where the template writes one.
    pub fn turn_end(&self) -> Option<&str> {
        self.turn_end.as_deref()
    }

    /// Whether tool schemas of a row reach the text.
    pub fn renders_tools(&self) -> bool {
        self.renders_tools
    }

    /// The text of `conversation`, as `apply_chat_template(tokenize=False)` gives it.
    pub fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<String> {
        self.render_messages(&conversation.messages, conversation, add_generation_prompt)
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
        let template = self.environment.get_template(name).map_err(|error| compile_error(&error))?;
        template.render(Value::from_pairs(context)).map_err(|error| render_error(&error))
    }

    /// A message as the template sees it; `mark` puts marks round its content.
    fn message_value(&self, message: &Message, mark: Option<usize>) -> Value {
        let lowered;
        let content = if self.renders_tool_calls || message.tool_calls().is_empty() {
            message.content.as_deref()
        } else {
            lowered = lower_tool_calls(message);
            Some(lowered.as_str())
        };
        let content = match (content, mark) {
            (None, _) => Value::from(()),
            (Some(text), None) => Value::from(text),
            (Some(text), Some(index)) => Value::from(spans::mark(text, index)),
        };
        let mut pairs = vec![("role", Value::from(message.role)), ("content", content)];
        pairs.extend(
            message
                .extra
                .iter()
                .filter(|(key, _)| key.as_str() != VERBATIM_CALL)
                .map(|(key, value)| (key.as_str(), to_jinja(value))),
        );
        Value::from_pairs(pairs)
    }

    fn probe(&mut self) {
        let render = |turns: &[(&'static str, &str)], add_generation_prompt| {
            let messages = turns.iter().map(|&(role, content)| Message::new(role, content)).collect();
            self.render(&Conversation { messages, ..Conversation::default() }, add_generation_prompt).ok()
        };
        let user = [("user", "probe question")];
        let generation_prompt = match (render(&user, true), render(&user, false)) {
            (Some(with), Some(without)) => with.strip_prefix(without.as_str()).map(str::to_owned),
            _ => None,
        };
        let answer = "probe answer";
        let turn_end = render(&[("user", "probe question"), ("assistant", answer)], false).and_then(|text| {
            let tail = &text[text.rfind(answer)? + answer.len()..];
            self.special_tokens
                .texts
                .iter()
                .filter_map(|token| Some((tail.find(token.as_str())?, std::cmp::Reverse(token.len()), token)))
                .min()
                .map(|(_, _, token)| token.clone())
        });
        self.generation_prompt = generation_prompt.unwrap_or_default();
        self.turn_end = turn_end;
    }
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
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", json::tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: &str| now.strftime(format).to_string());
    // Jinja2 says `none is iterable` is false; templates get `tools=None` from Transformers
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && !value.is_undefined() && value.try_iter().is_ok()
    });
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
