//! The tokens that end what the assistant says.
//!
//! In comes what a template writes after the last words or call of a turn; out goes how much of it the model has to
//! write to stop. Facts decide, in this order: what the template itself writes there in [probes](super::probes), the
//! tokens at which generation ends (`eos_token`, `eos_token_id` of `generation_config.json` and `config.json`), what is
//! there at the end of a chat as well as inside it, and the control token right after the turn, which may be the marker of
//! the next role. What a turn has after its stop, white space above all, is not the model's to say.

use aho_corasick::{AhoCorasick, MatchKind};

use super::SpecialTokens;
use super::marks::{is_white_space, leading_white_space, trim};

/// A control token in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Token {
    start: usize,
    end: usize,
    ends_generation: bool,
}

/// What closes a turn, in bytes of the text after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Closing {
    /// Where the tokens that stop begin; what is before belongs to the turn.
    pub(super) start: usize,
    /// One past the last.
    pub(super) end: usize,
}

/// Finds the control tokens of a tokenizer.
pub(super) struct TokenFinder {
    /// `None` without a tokenizer: then tokens are known by their look.
    finder: Option<AhoCorasick>,
    eos: Vec<String>,
}

impl TokenFinder {
    pub(super) fn new(special_tokens: &SpecialTokens) -> Self {
        let texts = special_tokens.texts.iter().filter(|text| !text.is_empty());
        let finder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts);
        let named = special_tokens.named.iter().filter(|(name, _)| name == "eos_token").map(|(_, text)| text);
        let eos = named.chain(&special_tokens.eos).cloned().collect();
        Self { finder: finder.ok().filter(|finder| finder.patterns_len() > 0), eos }
    }

    /// Whether `text` is a token of the tokenizer, as far as one is known.
    pub(super) fn is_token(&self, text: &str) -> bool {
        self.finder.as_ref().is_none_or(|finder| {
            finder.find(text).is_some_and(|found| found.start() == 0 && found.end() == text.len())
        })
    }

    /// Control tokens, in order.
    fn tokens(&self, text: &str) -> Vec<Token> {
        let token = |start: usize, end: usize| Token {
            start,
            end,
            ends_generation: self.eos.iter().any(|eos| eos == &text[start..end]),
        };
        if let Some(finder) = &self.finder {
            return finder.find_iter(text).map(|found| token(found.start(), found.end())).collect();
        }
        let mut tokens = Vec::new();
        let mut at = 0;
        while let Some(start) = text[at..].find('<').map(|found| at + found) {
            match leading_tag(&text[start..]) {
                Some(tag) => {
                    at = start + tag.len();
                    tokens.push(token(start, at));
                }
                None => at = start + 1,
            }
        }
        tokens
    }

    /// What closes an answer after which `tail` comes.
    ///
    /// `last` is what comes after the same answer at the end of a chat; the whole of `tail` where this is the end.
    /// `may_be_marker`: the first token of what follows may be what stops the answer.
    pub(super) fn after_answer(&self, tail: &str, last: &str, may_be_marker: bool) -> Option<Closing> {
        let tokens = self.tokens(tail);
        let near = &tokens[..leading(tail, &tokens)];
        let closing =
            |tokens: &[Token]| Some(Closing { start: tokens.first()?.start, end: tokens.last()?.end });
        if let Some(eos) = near.iter().position(|token| token.ends_generation) {
            return closing(&near[..=eos]);
        }
        let shared = shared_prefix(tail, last);
        let common = near.iter().take_while(|token| token.end <= shared).count();
        if common > 0 {
            return closing(&near[..common]);
        }
        // an end after words, as `[end of turn]`, which are the template's own where they stand inside a chat and at its end
        let words = tokens.iter().take_while(|token| token.end <= shared).count();
        if may_be_marker && words > 0 && trim(&last[..shared]).len() == trim(last).len() {
            let eos = tokens[..words].iter().position(|token| token.ends_generation);
            let end = eos.map_or(words, |eos| eos + 1);
            return closing(&tokens[end - 1..end]);
        }
        if may_be_marker && !near.is_empty() {
            return closing(&near[..1]);
        }
        // a token by its look that the tokenizer does not know: the end of a turn all the same, though nothing stops there
        let tag = leading_tag(tail.trim_start_matches(is_white_space))?;
        let start = leading_white_space(tail).len();
        (leading_tag(last.trim_start_matches(is_white_space)) == Some(tag))
            .then_some(Closing { start, end: start + tag.len() })
    }

    /// What closes a call after which `tail` comes; `last` and `may_be_marker` as for an answer.
    ///
    /// A call ends with words of the template's own, so that `last` has to say where it ends.
    pub(super) fn after_call(&self, tail: &str, last: &str, may_be_marker: bool) -> Option<Closing> {
        let tokens = self.tokens(tail);
        let shared = self.shared(tail, last);
        let core = tail[..shared].trim_end_matches(is_white_space).len();
        let common = &tokens[..tokens.iter().take_while(|token| token.end <= core).count()];
        let closing = |token: Token| Some(Closing { start: token.start, end: token.end });
        if let Some(eos) = common.iter().find(|token| token.ends_generation) {
            return closing(*eos);
        }
        let next =
            tokens[common.len()..].first().filter(|next| tail.get(core..next.start).is_some_and(is_blank));
        if let Some(next) = next.filter(|next| next.ends_generation) {
            return closing(*next);
        }
        match common.last().filter(|token| token.end == core) {
            Some(token) => closing(*token),
            None => next.filter(|_| may_be_marker).and_then(|token| closing(*token)),
        }
    }

    /// The bytes that `tail` and `last` share at their start, but for a part of a token.
    pub(super) fn shared(&self, tail: &str, last: &str) -> usize {
        let shared = shared_prefix(tail, last);
        let cut = self.tokens(tail).into_iter().find(|token| token.start < shared && shared < token.end);
        cut.map_or(shared, |token| token.start)
    }

    /// The first token of `tail` at which generation ends, where nothing else may be told of a call.
    pub(super) fn first_eos(&self, tail: &str, known: &[&str]) -> Option<Closing> {
        let mut tokens = self.tokens(tail).into_iter();
        let found =
            tokens.find(|token| token.ends_generation || known.contains(&&tail[token.start..token.end]));
        found.map(|token| Closing { start: token.start, end: token.end })
    }

    /// A generation prompt, and what of it opens a turn where its first tokens close the turn before.
    pub(super) fn openings_of<'p>(&self, prompt: &'p str) -> impl Iterator<Item = &'p str> {
        let mut tokens = self.tokens(prompt);
        tokens.truncate(leading(prompt, &tokens));
        std::iter::once(prompt).chain(tokens.into_iter().skip(1).map(|token| &prompt[token.start..]))
    }

    /// The first token that a generation prompt opens a turn with; those of `ends` close the turn before.
    pub(super) fn turn_marker(&self, prompt: &str, ends: &[&str]) -> Option<String> {
        let tokens = self.tokens(prompt);
        let mut leading =
            tokens[..leading(prompt, &tokens)].iter().map(|token| &prompt[token.start..token.end]);
        leading.find(|token| !ends.contains(token)).map(str::to_owned)
    }

    /// Where `token` stands first in `text`.
    pub(super) fn first_of(&self, text: &str, wanted: &str) -> Option<usize> {
        self.tokens(text)
            .iter()
            .find(|token| &text[token.start..token.end] == wanted)
            .map(|token| token.start)
    }

    /// The first token of `text`.
    pub(super) fn first_token<'t>(&self, text: &'t str) -> Option<&'t str> {
        self.tokens(text).first().map(|token| &text[token.start..token.end])
    }

    /// Where the last token of `text` begins.
    pub(super) fn last_start(&self, text: &str) -> Option<usize> {
        self.tokens(text).last().map(|token| token.start)
    }

    /// The last token of `text`, where it ends with one.
    pub(super) fn last_token<'t>(&self, text: &'t str) -> Option<&'t str> {
        let token = *self.tokens(text).last()?;
        (token.end == text.len()).then(|| &text[token.start..])
    }
}

/// How many of the `tokens` of `text` have nothing but white space before and between them.
fn leading(text: &str, tokens: &[Token]) -> usize {
    let ends = std::iter::once(0).chain(tokens.iter().map(|token| token.end));
    tokens.iter().zip(ends).take_while(|(token, at)| is_blank(&text[*at..token.start])).count()
}

fn is_blank(text: &str) -> bool {
    trim(text).is_empty()
}

/// A name in angle brackets that stands at the start of `text`, as most templates write control tokens
/// (`<|eot_id|>`, `</s>`, `<end_of_turn>`).
fn leading_tag(text: &str) -> Option<&str> {
    let end = text.find('>')? + 1;
    let tag = &text[..end];
    let is_tag = tag.starts_with('<') && (3..=48).contains(&end) && !tag[1..].contains(['<', ' ', '\n']);
    is_tag.then_some(tag)
}

/// The bytes that two texts share at their start, in whole characters.
pub(super) fn shared_prefix(left: &str, right: &str) -> usize {
    left.chars()
        .zip(right.chars())
        .take_while(|(one, other)| one == other)
        .map(|(one, _)| one.len_utf8())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finder(texts: &[&str], eos: &[&str]) -> TokenFinder {
        let own = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
        TokenFinder::new(&SpecialTokens { named: Vec::new(), texts: own(texts), eos: own(eos) })
    }

    fn answer<'t>(finder: &TokenFinder, tail: &'t str, last: &str) -> Option<&'t str> {
        finder.after_answer(tail, last, true).map(|closing| &tail[closing.start..closing.end])
    }

    #[test]
    fn an_answer_ends_where_facts_say() {
        let tokens =
            ["<|im_start|>", "<|im_end|>", "<|end|>", "<|start|>", "<|return|>", "<|user|>", "<a>", "<b>"];
        let plain = finder(&tokens, &[]);
        let chatml = "<|im_end|>\n<|im_start|>user\n";
        assert_eq!(answer(&plain, chatml, "<|im_end|>\n"), Some("<|im_end|>"));
        assert_eq!(answer(&plain, chatml, ""), Some("<|im_end|>"));
        assert_eq!(answer(&plain, "<|end|><|start|>user", "<|return|>"), Some("<|end|>"));
        assert_eq!(answer(&plain, "<|user|>\nq", ""), Some("<|user|>"));
        assert_eq!(plain.after_answer("<|user|>\nq", "", false), None);
        assert_eq!(answer(&plain, "<a><b>\nUser", "<a><b>\n"), Some("<a><b>"));
        assert_eq!(answer(&plain, "\n<a>\n<b>\n<|user|>", "\n<a>\n<b>\n"), Some("<a>\n<b>"));
        assert_eq!(answer(&plain, "\n### User:\n", "\n"), None);
        assert_eq!(answer(&plain, "<unknown>\nUser", "<unknown>"), Some("<unknown>"));
        assert_eq!(answer(&plain, "<unknown>\nUser", ""), None);
        let stopped = finder(&tokens, &["<b>"]);
        assert_eq!(answer(&stopped, "<a><b><|user|>", ""), Some("<a><b>"));
        assert_eq!(answer(&stopped, "<a> User <b>", ""), Some("<a>"));
        let ends = finder(&tokens, &["<|end|>", "<|im_end|>"]);
        assert_eq!(answer(&ends, "<|end|>\n<|im_end|>", "<|end|>\n<|im_end|>"), Some("<|end|>"));
    }

    #[test]
    fn a_call_ends_where_facts_say() {
        let tokens = ["<|call_end|>", "<|im_end|>", "<|obs|>", "<|response>"];
        let call = |eos: &[&str], tail: &'static str, last: &str| {
            finder(&tokens, eos).after_call(tail, last, true).map(|closing| &tail[closing.start..closing.end])
        };
        let tail = "\"}<|call_end|><|im_end|>\n<|obs|>";
        assert_eq!(call(&[], tail, "\"}<|call_end|><|im_end|>\n"), Some("<|im_end|>"));
        assert_eq!(call(&["<|im_end|>"], tail, "\"}<|call_end|>"), Some("<|im_end|>"));
        assert_eq!(call(&[], "}</tool_call><|obs|>\n", "}</tool_call>"), Some("<|obs|>"));
        assert_eq!(call(&[], "}<|call_end|><|response>r", "}<|call_end|>"), Some("<|call_end|>"));
        assert_eq!(call(&["<|response>"], "}<|call_end|><|response>r", "}<|call_end|>"), Some("<|response>"));
        assert_eq!(call(&[], "}</tool_call>\nTool:", "}</tool_call>\n"), None);
    }
}
