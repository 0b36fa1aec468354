//! How a template opens and closes what the assistant says, found by rendering small conversations.
//!
//! Probes carry the arguments of the row (`enable_thinking`, …), so that training, inference and what is shown to people
//! begin a turn in one place. What is found is a function of the template, the tokenizer and the arguments alone.

use serde_json::{Map, Value, json};

use crate::conversation::{Conversation, Message};

use super::ChatTemplate;
use super::marks;
use super::stops::{Closing, shared_prefix};

const QUESTION: &str = "probe question";
const AGAIN: &str = "probe again";
const ANSWER: &str = "probe answer";
const RESULT: &str = "probe result";
const NAME: &str = "probe_tool";

/// The end of a turn, as the template writes it in one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TurnEnd {
    /// What closes the turn: one or more tokens, with white space between at most.
    pub text: String,
    /// Words of the template between the turn and these tokens.
    pub(super) lead: String,
    /// The last of them, at which generation stops.
    pub token: String,
    /// Whether the tokenizer knows it as a token; else it is written in pieces, and nothing stops there.
    pub is_token: bool,
}

/// What closes the turns of a template; `None` where nothing does, or the template refuses such a turn.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TurnEnds {
    /// An answer before the next question.
    pub inner: Option<TurnEnd>,
    /// The answer at the end of a chat.
    pub last: Option<TurnEnd>,
    /// A call before the answer of the tool.
    pub call: Option<TurnEnd>,
}

impl TurnEnds {
    /// The tokens at which a tuned model stops, each once.
    pub fn tokens(&self) -> Vec<&str> {
        let mut tokens: Vec<&str> = Vec::new();
        let ends = [&self.inner, &self.last, &self.call];
        for end in ends.into_iter().flatten().filter(|end| end.is_token) {
            if !tokens.contains(&end.token.as_str()) {
                tokens.push(&end.token);
            }
        }
        tokens
    }
}

/// What probes found for one set of arguments.
#[derive(Debug, Default)]
pub(super) struct Probes {
    /// Role before a turn → what stands between its words and those of the assistant, the generation prompt included.
    pub(super) openings: Vec<(&'static str, String)>,
    /// What a generation prompt adds to a conversation that ends with a question; empty where the template adds nothing.
    pub(super) generation_prompt: String,
    /// The token that opens a turn of the assistant.
    pub(super) turn_marker: Option<String>,
    /// What stands before the name of a call, where a turn begins with it.
    pub(super) call_opening: Option<String>,
    pub(super) ends: TurnEnds,
}

impl ChatTemplate {
    pub(super) fn probe(&self, kwargs: &Map<String, Value>) -> Probes {
        let messages = |content_as_parts: bool, turns: &[(&'static str, &str)]| -> Vec<Message> {
            let message = |&(role, content): &(&'static str, &str)| {
                let parts = content_as_parts.then(|| vec![json!({"type": "text", "text": content})]);
                Message { parts, ..Message::new(role, content) }
            };
            turns.iter().map(message).collect()
        };
        let render = |messages: Vec<Message>, tools: Option<Value>, prompted: bool| {
            let chat_template_kwargs = kwargs.clone();
            let conversation =
                Conversation { messages, tools, chat_template_kwargs, ..Conversation::default() };
            self.render(&conversation, prompted).ok()
        };
        let chat = |turns: &[(&'static str, &str)], prompted| {
            // some templates take content as a list of parts alone, or chats with tools alone
            [(false, false), (true, false), (false, true), (true, true)].into_iter().find_map(
                |(parts, tools)| {
                    let text = render(messages(parts, turns), tools.then(a_tool), prompted)?;
                    turns.iter().all(|(_, content)| text.contains(content)).then_some(text)
                },
            )
        };
        let after = |text: &str, words: &str| text.rfind(words).map(|at| text[at + words.len()..].to_owned());

        let question = [("user", QUESTION)];
        let prompted = chat(&question, true);
        let generation_prompt = match (&prompted, chat(&question, false)) {
            (Some(with), Some(without)) => with.strip_prefix(without.as_str()).map(str::to_owned),
            _ => None,
        };
        let mut openings: Vec<(&'static str, String)> = Vec::new();
        openings.extend(prompted.and_then(|text| Some(("user", after(&text, QUESTION)?))));

        let turns = [("user", QUESTION), ("assistant", ANSWER), ("user", AGAIN)];
        let last = chat(&turns[..2], false).and_then(|text| after(&text, ANSWER));
        let inner = chat(&turns, false).and_then(|text| between(&text, ANSWER, AGAIN));
        let at_end = last.as_deref().unwrap_or_default();
        let find =
            |tail: &str, closing: Option<Closing>| closing.map(|closing| self.turn_end_of(tail, closing));
        let mut ends = TurnEnds {
            inner: inner.as_deref().and_then(|tail| find(tail, self.tokens.after_answer(tail, at_end, true))),
            last: last.as_deref().and_then(|tail| find(tail, self.tokens.after_answer(tail, tail, false))),
            call: None,
        };
        // what closes an answer inside a chat closes it at the end too, whatever comes after
        if let Some(inner) = ends
            .inner
            .as_ref()
            .filter(|inner| at_end.trim_start().starts_with(&format!("{}{}", inner.lead, inner.text)))
        {
            ends.last = Some(inner.clone());
        }
        let generation_prompt = generation_prompt.unwrap_or_default();
        let turn_marker = self.tokens.turn_marker(&generation_prompt, &ends.tokens());
        let mut probes = Probes { openings, generation_prompt, turn_marker, call_opening: None, ends };
        if self.renders_tool_calls {
            self.probe_call(&render, &mut probes);
        }
        probes
    }

    /// What opens the turn after the answer of a tool, and what opens and closes a call.
    fn probe_call(
        &self,
        render: &impl Fn(Vec<Message>, Option<Value>, bool) -> Option<String>,
        probes: &mut Probes,
    ) {
        const PLACE: &str = "probeplace";
        let call = |is_text: bool| {
            let arguments = json!({"place": PLACE});
            let arguments = if is_text { Value::from(arguments.to_string()) } else { arguments };
            let function = json!({"name": NAME, "arguments": arguments});
            let mut message = Message::new("assistant", "");
            message.extra.insert(
                "tool_calls".to_owned(),
                json!([{"id": "call00001", "type": "function", "function": function}]),
            );
            message
        };
        let result = || {
            let mut message = Message::new("tool", RESULT);
            message.extra.insert("tool_call_id".to_owned(), "call00001".into());
            message.extra.insert("name".to_owned(), NAME.into());
            message
        };
        let render = |is_text: bool, upto: usize, prompted: bool| {
            let messages = [Message::new("user", QUESTION), call(is_text), result()];
            render(messages.into_iter().take(upto).collect(), Some(a_tool()), prompted)
        };
        for is_text in [false, true] {
            let Some(text) = render(is_text, 3, false).filter(|text| text.contains(PLACE)) else { continue };
            let opening = render(is_text, 3, true)
                .and_then(|text| Some(text[text.rfind(RESULT)? + RESULT.len()..].to_owned()));
            probes.openings.extend(opening.map(|opening| ("tool", opening)));
            let question = probes.openings.iter().find(|(role, _)| *role == "user");
            probes.call_opening = between(&text, QUESTION, NAME)
                .zip(question)
                // a prompt may open more than a call keeps, a forced `<think>`
                .and_then(|(header, (_, opening))| match header.strip_prefix(opening.as_str()) {
                    Some(rest) => Some(rest.to_owned()),
                    None => Some(
                        header[header[..shared_prefix(&header, opening)].rfind(['>', '\n'])? + 1..]
                            .to_owned(),
                    ),
                });
            let Some(tail) = between(&text, PLACE, RESULT) else { return };
            let alone = render(is_text, 2, false);
            let last = alone.and_then(|text| Some(text[text.rfind(PLACE)? + PLACE.len()..].to_owned()));
            let closing = last.and_then(|last| {
                // a template may go on with a turn of its own
                let marker = probes.turn_marker.as_deref();
                let end = marker.and_then(|marker| self.tokens.first_of(&last, marker)).unwrap_or(last.len());
                self.tokens.after_call(&tail, &last[..end], true)
            });
            let closing = closing.or_else(|| self.tokens.first_eos(&tail, &probes.ends.tokens()));
            probes.ends.call = closing.map(|closing| self.turn_end_of(&tail, closing));
            return;
        }
    }

    fn turn_end_of(&self, tail: &str, closing: Closing) -> TurnEnd {
        let text = tail[closing.start..closing.end].to_owned();
        let token = self.tokens.last_token(&text).unwrap_or(&text).to_owned();
        let lead = tail[..closing.start].trim_start_matches(marks::is_white_space).to_owned();
        TurnEnd { is_token: self.tokens.is_token(&token), text, lead, token }
    }
}

/// The tools of a probe.
fn a_tool() -> Value {
    let place = json!({"type": "string", "description": "A place."});
    let parameters = json!({"type": "object", "properties": {"place": place}, "required": ["place"]});
    let function = json!({"name": NAME, "description": "A probe.", "parameters": parameters});
    json!([{"type": "function", "function": function}])
}

/// What stands between the last place of `first` and the place of `second` after it.
fn between(text: &str, first: &str, second: &str) -> Option<String> {
    let start = text.rfind(first)? + first.len();
    let length = text[start..].find(second)?;
    Some(text[start..start + length].to_owned())
}
