//! Templates made of pieces, and what each writes of a conversation, told without Jinja: an oracle of text and mask.

use std::fmt::Write as _;

use proptest::prelude::*;
use proptest::sample::select;
use serde_json::Value;
use sftcore::conversation::Message;
use sftcore::template::SpecialTokens;

/// The control tokens of the tokenizer.
const TOKENS: [&str; 15] = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|eom|>",
    "<|header|>",
    "<|content|>",
    "<|eot|>",
];

/// How the turn of a role is headed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Header {
    /// `<|im_start|>role\n`
    ChatMl,
    /// `<|role|>\n`
    Marker,
    /// `<|header|>role<|content|>\n\n`
    Bracketed,
    /// `### role: `, no token
    Words,
}

impl Header {
    fn around(self) -> (&'static str, &'static str) {
        match self {
            Self::ChatMl => ("<|im_start|>", "\n"),
            Self::Marker => ("<|", "|>\n"),
            Self::Bracketed => ("<|header|>", "<|content|>\n\n"),
            Self::Words => ("### ", ": "),
        }
    }

    fn of(self, role: &str) -> String {
        let (before, after) = self.around();
        format!("{before}{role}{after}")
    }
}

/// How reasoning is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Thinking {
    /// Not at all.
    LeftOut,
    /// Of every turn.
    Always,
    /// Of turns after the last question.
    AfterLastQuestion,
}

/// How calls are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Calls {
    /// `<tool_call>\n{…}\n</tool_call>` each.
    Json,
    /// `<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>` each.
    Xml,
    /// Not at all, though the template names them.
    LeftOut,
}

/// A template.
#[expect(clippy::struct_excessive_bools, reason = "what templates do, each by itself")]
#[derive(Debug, Clone)]
pub(crate) struct Form {
    pub(crate) header: Header,
    /// What closes an answer before another turn, and at the end.
    pub(crate) inner: &'static str,
    pub(crate) last: &'static str,
    /// What closes a turn that ends with calls, before another turn.
    pub(crate) call_end: &'static str,
    /// What closes the turns of others.
    pub(crate) other: &'static str,
    /// What comes after each end.
    pub(crate) after: &'static str,
    pub(crate) trims: bool,
    /// A system message of the template's own stands before a chat that begins with none.
    pub(crate) default_system: bool,
    /// Results stand inside the turn that called: what follows has no header, and a prompt gives nothing.
    pub(crate) results_in_turn: bool,
    /// The last turn is closed for a generation prompt alone.
    pub(crate) closes_for_prompt: bool,
    /// System messages are gathered at the start.
    pub(crate) gathers: bool,
    pub(crate) thinking: Thinking,
    /// What a prompt adds to the header where `enable_thinking` is false, and a turn without reasoning begins with.
    pub(crate) forced: &'static str,
    /// The same where it is not.
    pub(crate) opened: &'static str,
    pub(crate) calls: Calls,
    pub(crate) calls_first: bool,
    /// Words beside calls are left out.
    pub(crate) drops_words: bool,
    /// Tokens at which generation ends.
    pub(crate) eos: Vec<String>,
}

pub(crate) fn forms() -> impl Strategy<Value = Form> {
    let ends = select(vec![
        ("<|im_end|>", "<|im_end|>"),
        ("</s>", "</s>"),
        ("<|end|>", "<|return|>"),
        ("<|eot|>\n</s>", "<|eot|>\n</s>"),
        ("<|end|><|eot|>", "<|end|><|eot|>"),
        ("<|im_end|>", ""),
        ("", ""),
        ("", "</s>"),
    ]);
    let headers = select(vec![Header::ChatMl, Header::Marker, Header::Bracketed, Header::Words]);
    let prompts =
        select(vec![("", ""), ("<think>\n\n</think>\n\n", ""), ("\n<think></think>", ""), ("", "<think>\n")]);
    let thinking = select(vec![Thinking::LeftOut, Thinking::Always, Thinking::AfterLastQuestion]);
    let calls = select(vec![Calls::Json, Calls::Xml, Calls::LeftOut]);
    let eos =
        select(vec![vec![], vec!["</s>"], vec!["<|eot|>", "<|im_end|>"], vec!["<|call|>", "<|return|>"]]);
    let call_end = prop::option::of(select(vec!["<|call|>", "<|eom|>"]));
    (
        headers,
        ends,
        select(vec!["", "<|end|>", "</s>"]),
        select(vec!["", "\n"]),
        any::<(bool, bool, bool, bool, bool, bool, bool)>(),
        thinking,
        prompts,
        calls,
        eos,
        call_end,
    )
        .prop_map(
            |(
                header,
                (inner, last),
                other,
                after,
                flags,
                thinking,
                (forced, opened),
                calls,
                eos,
                call_end,
            )| {
                let (
                    trims,
                    gathers,
                    calls_first,
                    drops_words,
                    default_system,
                    closes_for_prompt,
                    results_in_turn,
                ) = flags;
                // a result that nothing closes may end with the line break that its answer begins with
                let results_in_turn = results_in_turn && !other.is_empty() && calls != Calls::LeftOut;
                // nor where words of a header begin that come after what closes the turn before
                let closes_for_prompt = closes_for_prompt && header != Header::Words;
                // of two tokens before the next header nothing tells which stop, where neither is at the end of a chat
                let inner = if closes_for_prompt && inner.len() > 10 { "<|im_end|>" } else { inner };
                Form {
                    header,
                    inner,
                    last: if closes_for_prompt { "" } else { last },
                    default_system,
                    results_in_turn,
                    closes_for_prompt,
                    call_end: call_end.unwrap_or(inner),
                    other,
                    after,
                    trims,
                    gathers,
                    thinking,
                    forced,
                    opened,
                    calls,
                    calls_first,
                    drops_words,
                    eos: eos.into_iter().map(str::to_owned).collect(),
                }
            },
        )
}

/// What a form writes of a conversation.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub(crate) text: String,
    /// Turns of the assistant: the first byte, the first of what closes it, one past that, the message.
    pub(crate) turns: Vec<(usize, usize, usize, usize)>,
    /// What is not in the text: the message, and `words`, `reasoning` or `calls`.
    pub(crate) lost: Vec<(usize, &'static str)>,
    /// A turn of which only its end is there.
    pub(crate) is_refused: bool,
}

/// Where an answer stands.
#[derive(Clone, Copy)]
struct Place {
    number: usize,
    is_after_question: bool,
    is_last: bool,
    /// Without a header, after the answer of a tool.
    goes_on: bool,
}

impl Form {
    pub(crate) fn special_tokens(&self) -> SpecialTokens {
        let texts = TOKENS.iter().map(|&token| token.to_owned()).collect();
        let named = vec![("bos_token".to_owned(), "<s>".to_owned())];
        SpecialTokens { named, texts, eos: self.eos.clone() }
    }

    /// The Jinja source.
    pub(crate) fn source(&self) -> String {
        let (before, after) = self.header.around();
        let trim = if self.trims { "|trim" } else { "" };
        let mut source = String::from("{{- '<s>' -}}\n");
        source += "{%- set ns = namespace(last=-1, system='', tool=false) -%}\n";
        source += "{%- for m in messages if m.role == 'system' -%}{%- set ns.system = ns.system + m.content";
        source += trim;
        source += " + '\\n' -%}{%- endfor -%}\n";
        source += "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}\n";
        if self.gathers {
            let _ = writeln!(
                source,
                "{{%- if ns.system -%}}{{{{- {} + ns.system + {} -}}}}{{%- endif -%}}",
                quoted(&self.header.of("system")),
                quoted(&self.closed())
            );
        }
        source += "{%- for m in messages -%}\n";
        if self.default_system {
            let _ = writeln!(
                source,
                "{{%- if loop.first and m.role != 'system' -%}}{{{{- {} -}}}}{{%- endif -%}}",
                quoted(&self.default_turn())
            );
        }
        source += "{%- if m.role == 'assistant' -%}\n";
        let header = quoted(&self.header.of("assistant"));
        let in_turn = if self.results_in_turn { "ns.tool" } else { "false" };
        let _ = writeln!(source, "{{%- if not {in_turn} -%}}{{{{- {header} -}}}}{{%- endif -%}}");
        let reasoning = match self.thinking {
            Thinking::LeftOut => "false",
            Thinking::Always => "m.reasoning_content is defined",
            Thinking::AfterLastQuestion => "m.reasoning_content is defined and loop.index0 > ns.last",
        };
        let off = "enable_thinking is defined and enable_thinking is false";
        let _ = writeln!(
            source,
            "{{%- if {reasoning} -%}}{{{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}}}"
        );
        let _ = writeln!(source, "{{%- elif {off} -%}}{{{{- {} -}}}}{{%- endif -%}}", quoted(self.forced));
        let words = format!("{{{{- m.content{trim} -}}}}");
        let kept = if self.drops_words {
            format!("{{%- if not m.tool_calls -%}}{words}{{%- endif -%}}")
        } else {
            words
        };
        if !self.calls_first {
            let _ = writeln!(source, "{kept}");
        }
        let call = match self.calls {
            Calls::Json => "{{- '<tool_call>\\n' + (c.function | tojson) + '\\n</tool_call>' -}}",
            Calls::Xml => concat!(
                "{{- '<function=' + c.function.name + '>\\n' -}}{%- for k, v in c.function.arguments.items() -%}",
                "{{- '<parameter=' + k + '>\\n' + v + '\\n</parameter>\\n' -}}{%- endfor -%}{{- '</function>' -}}"
            ),
            Calls::LeftOut => "",
        };
        let _ = writeln!(source, "{{%- for c in m.tool_calls or [] -%}}{call}{{%- endfor -%}}");
        if self.calls_first {
            let _ = writeln!(source, "{kept}");
        }
        let ends_with_call = if self.calls_first { "m.tool_calls and not m.content" } else { "m.tool_calls" };
        let ends_with_call =
            if self.calls_first && self.drops_words { "m.tool_calls" } else { ends_with_call };
        let open = if self.closes_for_prompt { " and not add_generation_prompt" } else { "" };
        let _ = writeln!(
            source,
            "{{{{- {} if loop.last{open} else ({} if {ends_with_call} else {}) -}}}}{{{{- {} -}}}}",
            quoted(self.last),
            quoted(self.call_end),
            quoted(self.inner),
            quoted(self.after)
        );
        let condition = if self.gathers { "{%- elif m.role != 'system' -%}" } else { "{%- else -%}" };
        let closed = quoted(&self.closed());
        let closed = if self.closes_for_prompt {
            format!("({closed} if add_generation_prompt or not loop.last else '')")
        } else {
            closed
        };
        let _ = writeln!(
            source,
            "{condition}{{{{- {} + m.role + {} + m.content{trim} + {closed} -}}}}\n{{%- endif -%}}\n{{%- set ns.tool = m.role == 'tool' -%}}\n{{%- endfor -%}}",
            quoted(before),
            quoted(after),
        );
        let _ = writeln!(
            source,
            "{{%- if add_generation_prompt and not {in_turn} -%}}{{{{- {} + ({} if {off} else {}) -}}}}{{%- endif -%}}",
            quoted(&self.header.of("assistant")),
            quoted(self.forced),
            quoted(self.opened)
        );
        source
    }

    fn default_turn(&self) -> String {
        format!("{}Be kind.{}", self.header.of("system"), self.closed())
    }

    fn closed(&self) -> String {
        format!("{}{}", self.other, self.after)
    }

    /// What this form writes of `messages`.
    pub(crate) fn write(&self, messages: &[Message], is_thinking_off: bool) -> Written {
        let mut written = Written { text: "<s>".to_owned(), ..Written::default() };
        let kept = |text: &str| if self.trims { text.trim().to_owned() } else { text.to_owned() };
        let last_question = messages.iter().rposition(|message| message.role == "user");
        let systems: Vec<_> = messages.iter().filter(|message| message.role == "system").collect();
        if self.gathers && !systems.is_empty() {
            written.text += &self.header.of("system");
            for system in systems {
                written.text += &kept(content(system));
                written.text += "\n";
            }
            written.text += &self.closed();
        }
        for (number, message) in messages.iter().enumerate() {
            if number == 0 && self.default_system && message.role != "system" {
                written.text += &self.default_turn();
            }
            if message.role == "assistant" {
                let is_after = last_question.is_none_or(|last| number > last);
                let is_last = number + 1 == messages.len();
                let goes_on = self.results_in_turn && number > 0 && messages[number - 1].role == "tool";
                let place = Place { number, is_after_question: is_after, is_last, goes_on };
                self.write_answer(&mut written, message, is_thinking_off, place);
            } else if message.role != "system" || !self.gathers {
                self.stop_by_marker(&mut written, message.role);
                written.text += &self.header.of(message.role);
                written.text += &kept(content(message));
                if !self.closes_for_prompt || number + 1 < messages.len() {
                    written.text += &self.closed();
                }
            }
        }
        for turn in &mut written.turns {
            if turn.1 == turn.2 {
                // white space at the end is nothing to learn where nothing stops there
                turn.1 = turn.0 + written.text[turn.0..turn.1].trim_end().len();
                turn.2 = turn.1;
            }
        }
        written
    }

    /// What nothing closes is stopped by the marker of the next role, where that is a token; its own role stops nothing.
    fn stop_by_marker(&self, written: &mut Written, role: &str) {
        let marker = self.marker(role);
        let may_stop = !marker.is_empty() && (role != "assistant" || self.header != Header::Marker);
        let at = written.text.trim_end().len();
        let last = written.turns.last_mut().filter(|turn| turn.1 == turn.2 && turn.1 >= at);
        if let Some(turn) = last.filter(|_| may_stop) {
            turn.1 = written.text.len();
            turn.2 = turn.1 + marker.len();
        }
    }

    /// The token that a header of `role` begins with.
    fn marker(&self, role: &str) -> String {
        match self.header {
            Header::ChatMl => "<|im_start|>".to_owned(),
            Header::Marker => format!("<|{role}|>"),
            Header::Bracketed => "<|header|>".to_owned(),
            Header::Words => String::new(),
        }
    }

    fn write_answer(&self, written: &mut Written, message: &Message, is_thinking_off: bool, place: Place) {
        let Place { number, is_after_question, is_last, goes_on } = place;
        if !goes_on {
            self.stop_by_marker(written, "assistant");
            written.text += &self.header.of("assistant");
        }
        let mut said = String::new();
        let reasoning = message.extra.get("reasoning_content").and_then(Value::as_str);
        let is_shown = match self.thinking {
            Thinking::LeftOut => false,
            Thinking::Always => true,
            Thinking::AfterLastQuestion => is_after_question,
        };
        match reasoning {
            Some(reasoning) if is_shown => {
                let _ = write!(said, "<think>\n{reasoning}\n</think>\n\n");
            }
            _ if is_thinking_off => said += self.forced,
            _ => {}
        }
        let mut is_empty = reasoning.is_none() || !is_shown;
        if reasoning.is_some() && !is_shown {
            written.lost.push((number, "reasoning"));
        }
        let calls = message.tool_calls();
        let words = if self.trims { content(message).trim() } else { content(message) };
        let has_words = !words.is_empty();
        let keeps_words = calls.is_empty() || !self.drops_words;
        if has_words && !keeps_words {
            written.lost.push((number, "words"));
        }
        if has_words && keeps_words {
            is_empty = false;
        }
        let words = if keeps_words { words } else { "" };
        if !self.calls_first {
            said += words;
        }
        for call in calls {
            let function = &call["function"];
            let name = function["name"].as_str().unwrap_or_default();
            match self.calls {
                Calls::Json => {
                    let _ = write!(said, "<tool_call>\n{}\n</tool_call>", spaced(function));
                }
                Calls::Xml => {
                    let _ = writeln!(said, "<function={name}>");
                    for (key, value) in function["arguments"].as_object().into_iter().flatten() {
                        let value = value.as_str().unwrap_or_default();
                        let _ = write!(said, "<parameter={key}>\n{value}\n</parameter>\n");
                    }
                    said += "</function>";
                }
                Calls::LeftOut => {}
            }
        }
        if !calls.is_empty() {
            if self.calls == Calls::LeftOut {
                written.lost.push((number, "calls"));
            } else {
                is_empty = false;
            }
        }
        if self.calls_first {
            said += words;
        }
        let says_something = reasoning.is_some() || has_words || !calls.is_empty();
        let prompt = if is_thinking_off { self.forced } else { self.opened };
        let start = written.text.len() + if goes_on { 0 } else { given(prompt, &said) };
        written.text += &said;
        let stop = written.text.len();
        let ends_with_call =
            !calls.is_empty() && (!self.calls_first || self.drops_words || content(message).is_empty());
        let end = match (is_last, ends_with_call) {
            (true, _) => self.last,
            (false, true) => self.call_end,
            (false, false) => self.inner,
        };
        written.text += end;
        let stops = self.stops(end);
        written.turns.push((start, stop, stop + stops, number));
        written.text += self.after;
        written.is_refused |= message.weight > 0.0 && is_empty && says_something;
    }

    /// How much of what closes a turn has to be written to stop: up to the first token at which generation ends.
    fn stops(&self, end: &str) -> usize {
        let ends = self.eos.iter().filter_map(|eos| Some(end.find(eos.as_str())? + eos.len()));
        ends.min().unwrap_or(end.len())
    }
}

/// How much of `said` the prompt gives after the header: all that it adds, or as many whole tags and lines as both share.
fn given(prompt: &str, said: &str) -> usize {
    let shared = prompt.bytes().zip(said.bytes()).take_while(|(one, other)| one == other).count();
    if shared == prompt.len() { shared } else { prompt[..shared].rfind(['>', '\n']).map_or(0, |at| at + 1) }
}

fn content(message: &Message) -> &str {
    message.content.as_deref().unwrap_or_default()
}

/// JSON with a space after `,` and `:`, as Python writes it.
fn spaced(value: &Value) -> String {
    match value {
        Value::Object(object) => {
            let pairs =
                object.iter().map(|(key, value)| format!("{}: {}", Value::from(key.as_str()), spaced(value)));
            format!("{{{}}}", pairs.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\n', "\\n"))
}
