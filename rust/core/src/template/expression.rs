//! Expressions as Jinja2 reads them.
//!
//! A parser goes over the tokens of a block and notes the [edits](super::rewriter) on its way; it keeps no tree.

use super::methods::METHODS;
use super::operators as filters;
use super::print::TEXT;
use super::python::{BOUND, EACH};
use super::rewriter::Edit;
use super::tokens::{self, Token};

/// What is known of an operand: where it stands, and whether it must be put in brackets before a filter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A string literal.
    Text,
    /// A number, a truth or `none`.
    Constant,
    /// What a filter may follow.
    Tight,
    /// A truth, by a test or a comparison.
    Truth,
    /// Anything else.
    Loose,
}

/// What is left of a block, and what is to be changed in it.
pub(super) struct Parser<'c> {
    pub(super) code: &'c str,
    pub(super) tokens: &'c [Token<'c>],
    pub(super) at: usize,
    pub(super) edits: Vec<Edit>,
    pub(super) has_markup: bool,
    pub(super) in_macro: bool,
}

type Parsed = Result<Operand, String>;

impl<'c> Parser<'c> {
    pub(super) fn peek(&self) -> &'c str {
        self.tokens.get(self.at).map_or("", |token| token.text)
    }

    pub(super) fn next(&mut self) -> Result<Token<'c>, String> {
        let token = self.tokens.get(self.at).copied().ok_or("a block ends too early")?;
        self.at += 1;
        Ok(token)
    }

    pub(super) fn skip(&mut self, text: &str) -> bool {
        let is_next = self.peek() == text;
        self.at += usize::from(is_next);
        is_next
    }

    pub(super) fn expect(&mut self, text: &str) -> Result<Token<'c>, String> {
        let token = self.next()?;
        if token.text == text { Ok(token) } else { Err(format!("expected `{text}`, found `{}`", token.text)) }
    }

    pub(super) fn expect_end(&self) -> Result<(), String> {
        match self.peek() {
            "" => Ok(()),
            other => Err(format!("unexpected `{other}`")),
        }
    }

    /// Values with commas between them, and whether there are such without brackets round them.
    pub(super) fn tuple(&mut self, has_condition: bool) -> Result<(Operand, bool), String> {
        let first = self.expression(has_condition)?;
        let mut last = first;
        let mut is_tuple = false;
        while self.peek() == "," {
            let comma = self.next()?;
            is_tuple = true;
            if matches!(self.peek(), "" | ")" | "recursive") {
                last.end = comma.end();
                break;
            }
            last = self.expression(has_condition)?;
        }
        let kind = if is_tuple { Kind::Loose } else { first.kind };
        Ok((Operand { start: first.start, end: last.end, kind }, is_tuple))
    }

    pub(super) fn expression(&mut self, has_condition: bool) -> Parsed {
        let mut value = self.or()?;
        while has_condition && self.skip("if") {
            let condition = self.or()?;
            let mut end = condition.end;
            if self.skip("else") {
                end = self.expression(true)?.end;
            }
            value = Operand { start: value.start, end, kind: Kind::Loose };
        }
        Ok(value)
    }

    fn or(&mut self) -> Parsed {
        let mut left = self.and()?;
        while self.skip("or") {
            left = Operand { start: left.start, end: self.and()?.end, kind: Kind::Loose };
        }
        Ok(left)
    }

    fn and(&mut self) -> Parsed {
        let mut left = self.not()?;
        while self.skip("and") {
            left = Operand { start: left.start, end: self.not()?.end, kind: Kind::Loose };
        }
        Ok(left)
    }

    fn not(&mut self) -> Parsed {
        if self.peek() != "not" {
            return self.comparison();
        }
        let start = self.next()?.start;
        Ok(Operand { start, end: self.not()?.end, kind: Kind::Truth })
    }

    fn comparison(&mut self) -> Parsed {
        let left = self.sum()?;
        let mut result = left;
        let mut is_chained = false;
        let mut is_native = true;
        loop {
            let operator = self.peek();
            let second = self.tokens.get(self.at + 1).map_or("", |token| token.text);
            let is_not_in = operator == "not" && second == "in";
            if !matches!(operator, "==" | "!=" | "<" | "<=" | ">" | ">=" | "in") && !is_not_in {
                return Ok(result);
            }
            let start = self.next()?;
            let end = if is_not_in { self.next()?.end() } else { start.end() };
            let right = self.sum()?;
            // the engine rounds whole numbers to compare them with such as have fractions
            let is_constant = |operand: Operand| match operand.kind {
                Kind::Text => true,
                Kind::Constant => {
                    !self.code[operand.start..operand.end].contains(['.', 'e', 'E'])
                        || !self.is_digit(operand)
                }
                _ => false,
            };
            let name = match operator {
                "==" | "!=" if is_constant(left) || is_constant(right) => None,
                "==" => Some(filters::EQUAL),
                "!=" => Some(filters::UNEQUAL),
                "<" => Some(filters::LESS),
                "<=" => Some(filters::AT_MOST),
                ">" => Some(filters::MORE),
                ">=" => Some(filters::AT_LEAST),
                "in" => Some(filters::IN),
                _ => Some(filters::NOT_IN),
            };
            if is_chained && (name.is_some() || !is_native) {
                return Err("a chain of comparisons (a < b < c) is not known here; write `a < b and b < c`"
                    .to_owned());
            }
            result = match name {
                Some(name) => self.binary(result, (start.start, end), right, name),
                None => Operand { start: left.start, end: right.end, kind: Kind::Truth },
            };
            is_native = name.is_none();
            is_chained = true;
        }
    }

    fn is_digit(&self, operand: Operand) -> bool {
        self.code[operand.start..operand.end].contains(|each: char| each.is_ascii_digit())
    }

    fn sum(&mut self) -> Parsed {
        let mut left = self.concat()?;
        while matches!(self.peek(), "+" | "-") {
            self.next()?;
            let right = self.concat()?;
            self.check_plain(left);
            self.check_plain(right);
            left = Operand { start: left.start, end: right.end, kind: Kind::Loose };
        }
        Ok(left)
    }

    /// Where a text may be markup, an operator on it is refused when it comes to it.
    fn check_plain(&mut self, operand: Operand) {
        if self.has_markup && matches!(operand.kind, Kind::Tight) {
            self.filter(operand, filters::PLAIN);
        }
    }

    fn concat(&mut self) -> Parsed {
        let mut left = self.product()?;
        if self.peek() != "~" {
            return Ok(left);
        }
        self.text_of(left);
        while self.skip("~") {
            let right = self.product()?;
            self.text_of(right);
            left = Operand { start: left.start, end: right.end, kind: Kind::Loose };
        }
        Ok(left)
    }

    /// What stands beside `~` becomes text: the engine would write numbers its own way there.
    fn text_of(&mut self, operand: Operand) {
        if operand.kind == Kind::Tight {
            self.close(operand.end, &format!("|{TEXT}"));
        } else if operand.kind != Kind::Text {
            self.filter(operand, TEXT);
        }
    }

    fn product(&mut self) -> Parsed {
        let mut left = self.power()?;
        while matches!(self.peek(), "*" | "/" | "//" | "%") {
            let operator = self.next()?;
            let right = self.power()?;
            let is_number = left.kind != Kind::Text && right.kind == Kind::Constant && !self.has_markup;
            left = match operator.text {
                "%" if !is_number => {
                    self.binary(left, (operator.start, operator.end()), right, filters::REMAINDER)
                }
                "/" | "//" => {
                    let name = if operator.text == "/" { filters::QUOTIENT } else { filters::WHOLE_QUOTIENT };
                    self.binary(left, (operator.start, operator.end()), right, name)
                }
                _ => {
                    self.check_plain(left);
                    self.check_plain(right);
                    Operand { start: left.start, end: right.end, kind: Kind::Loose }
                }
            };
        }
        Ok(left)
    }

    fn power(&mut self) -> Parsed {
        let mut left = self.unary(true)?;
        while self.peek() == "**" {
            let operator = self.next()?;
            let right = self.unary(true)?;
            left = self.binary(left, (operator.start, operator.end()), right, filters::POWER);
        }
        Ok(left)
    }

    fn unary(&mut self, has_filters: bool) -> Parsed {
        let value = match self.peek() {
            "-" => {
                let sign = self.next()?;
                let operand = self.unary(false)?;
                let value = Operand { start: sign.start, end: operand.end, kind: Kind::Constant };
                if operand.kind == Kind::Constant {
                    value
                } else {
                    self.open(value.start, "(");
                    self.close(value.end, ")");
                    Operand { kind: Kind::Tight, ..value }
                }
            }
            "+" => {
                let sign = self.next()?;
                let operand = self.unary(false)?;
                self.replace_token(sign, "");
                self.filter(operand, filters::PLUS);
                Operand { start: sign.start, end: operand.end, kind: Kind::Tight }
            }
            _ => self.primary()?,
        };
        let value = self.postfix(value)?;
        if has_filters { self.filters(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Parsed {
        let token = self.next()?;
        let operand = |kind: Kind| Operand { start: token.start, end: token.end(), kind };
        if token.is_string() {
            self.literal(token)?;
            let mut end = token.end();
            while self.tokens.get(self.at).is_some_and(Token::is_string) {
                let more = self.next()?;
                self.literal(more)?;
                end = more.end();
            }
            return Ok(Operand { end, ..operand(Kind::Text) });
        }
        if token.is_number() {
            return if tokens::is_number(token.text) {
                Ok(operand(Kind::Constant))
            } else {
                Err(format!("`{}` is no number", token.text))
            };
        }
        if token.is_word() {
            return match token.text {
                "true" | "false" | "none" | "True" | "False" | "None" => Ok(operand(Kind::Constant)),
                "varargs" | "kwargs" if self.in_macro => {
                    Err(format!("`{}` of a macro is not known here; name its parameters", token.text))
                }
                _ => Ok(operand(Kind::Tight)),
            };
        }
        let end = match token.text {
            "(" => {
                if self.peek() != ")" {
                    self.tuple(true)?;
                }
                self.expect(")")?
            }
            "[" => {
                while self.peek() != "]" {
                    self.expression(true)?;
                    if !self.skip(",") {
                        break;
                    }
                }
                self.expect("]")?
            }
            "{" => {
                while self.peek() != "}" {
                    let key = self.expression(true)?;
                    if !matches!(key.kind, Kind::Text | Kind::Constant) {
                        self.filter(key, filters::KEY);
                    }
                    self.expect(":")?;
                    self.expression(true)?;
                    if !self.skip(",") {
                        break;
                    }
                }
                self.expect("}")?
            }
            other => return Err(format!("unexpected `{other}`")),
        };
        Ok(Operand { end: end.end(), ..operand(Kind::Tight) })
    }

    /// A string literal with escapes, as the engine reads it.
    fn literal(&mut self, token: Token) -> Result<(), String> {
        if token.text.contains('\\') {
            let text = tokens::unescape(token.text.get(1..token.text.len() - 1).unwrap_or_default())?;
            // lines keep their numbers
            let lines = token.text.matches('\n').count();
            self.replace_token(token, tokens::quoted(&text) + &"\n".repeat(lines));
        }
        Ok(())
    }

    fn postfix(&mut self, mut value: Operand) -> Parsed {
        loop {
            match self.peek() {
                "." => {
                    self.next()?;
                    let name = self.next()?;
                    if METHODS.contains(&name.text) && self.peek() != "(" {
                        self.replace_token(name, format!("{BOUND}{}()", name.text));
                    } else if !name.is_word() && !name.is_number() {
                        return Err(format!("unexpected `{}`", name.text));
                    }
                    value = Operand { start: value.start, end: name.end(), kind: Kind::Tight };
                }
                "[" => value = self.subscript(value)?,
                "(" => value = self.call(value)?,
                _ => return Ok(value),
            }
        }
    }

    fn subscript(&mut self, base: Operand) -> Parsed {
        let bracket = self.next()?;
        let mut parts: [bool; 3] = [false; 3];
        let mut colons = Vec::new();
        let mut key = None;
        while self.peek() != "]" {
            if self.peek() == ":" && colons.len() < 2 {
                colons.push(self.next()?);
            } else if parts[colons.len()] {
                return Err(format!("unexpected `{}`", self.peek()));
            } else {
                parts[colons.len()] = true;
                key = Some((self.at, self.expression(true)?));
            }
        }
        let close = self.next()?;
        let value = Operand { start: base.start, end: close.end(), kind: Kind::Tight };
        if colons.is_empty() {
            let Some((at, key)) = key else { return Err("unexpected `]`".to_owned()) };
            let literal = self.tokens[at].text;
            let is_name = key.kind == Kind::Text && !METHODS.contains(&literal.trim_matches(['\'', '"']));
            let is_message = &self.code[base.start..base.end] == "messages" && key.kind == Kind::Constant;
            if !is_name && !is_message {
                self.open(base.start, "((");
                self.replace_token(bracket, format!(")|{}(", filters::ITEM));
                self.replace_token(close, "))");
            }
            return Ok(value);
        }
        self.open(base.start, "((");
        let none = |is_there: bool| if is_there { "" } else { "none" };
        self.replace_token(bracket, format!(")|{}({}", filters::SLICE, none(parts[0])));
        for (number, colon) in colons.iter().enumerate() {
            self.replace_token(*colon, format!(", {}", none(parts[number + 1])));
        }
        self.replace_token(close, "))");
        Ok(value)
    }

    fn call(&mut self, value: Operand) -> Parsed {
        let is_loop = &self.code[value.start..value.end] == "loop";
        let end = self.arguments(is_loop)?;
        Ok(Operand { start: value.start, end, kind: Kind::Tight })
    }

    /// Arguments in brackets; where they end.
    pub(super) fn arguments(&mut self, is_loop: bool) -> Result<usize, String> {
        self.expect("(")?;
        while self.peek() != ")" {
            if matches!(self.peek(), "*" | "**") {
                self.next()?;
            }
            if self.tokens.get(self.at + 1).is_some_and(|token| token.text == "=") {
                if self.peek().starts_with('_') {
                    return Err(format!("an argument with the name `{}` is not known here", self.peek()));
                }
                self.at += 2;
            }
            let argument = self.expression(true)?;
            if is_loop {
                self.filter(argument, EACH);
            }
            if !self.skip(",") {
                break;
            }
        }
        Ok(self.expect(")")?.end())
    }

    fn filters(&mut self, mut value: Operand) -> Parsed {
        loop {
            match self.peek() {
                "|" => {
                    let start = self.next()?.start;
                    let end = self.filter_name()?;
                    // a sign binds less here than a filter does in the engine
                    let is_sign = self.code[value.start..].starts_with('-') && value.kind == Kind::Constant;
                    if is_sign || value.kind == Kind::Truth {
                        self.open(value.start, "(");
                        self.close(start, ")");
                    }
                    value = Operand { start: value.start, end, kind: Kind::Tight };
                }
                "is" => {
                    self.next()?;
                    self.skip("not");
                    let mut end = self.next()?.end();
                    while self.skip(".") {
                        end = self.next()?.end();
                    }
                    if self.peek() == "(" {
                        end = self.arguments(false)?;
                    } else if self.peek() == "is" {
                        return Err("tests cannot follow each other; put brackets round the first".to_owned());
                    } else if let Some(token) = self.tokens.get(self.at) {
                        let is_argument = token.is_string()
                            || token.is_number()
                            || matches!(token.text, "[" | "{")
                            || token.is_word()
                                && !matches!(
                                    token.text,
                                    "else" | "or" | "and" | "if" | "is" | "in" | "not" | "recursive"
                                );
                        if is_argument {
                            let argument = self.primary()?;
                            end = self.postfix(argument)?.end;
                        }
                    }
                    value = Operand { start: value.start, end, kind: Kind::Truth };
                }
                "(" => value = self.call(value)?,
                _ => return Ok(value),
            }
        }
    }

    /// The name of a filter and its arguments; where they end.
    pub(super) fn filter_name(&mut self) -> Result<usize, String> {
        let name = self.next()?;
        if !name.is_word() {
            return Err(format!("unexpected `{}`", name.text));
        }
        let mut end = name.end();
        while self.skip(".") {
            end = self.next()?.end();
        }
        if self.peek() == "(" { self.arguments(false) } else { Ok(end) }
    }
}
