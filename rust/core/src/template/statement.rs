//! The statements of a template: where their expressions are, and what they set.

use super::expression::Parser;
use super::python::{EACH, KEEP};

impl Parser<'_> {
    pub(super) fn statement(&mut self) -> Result<(), String> {
        let Some(word) = self.tokens.first().copied() else { return Ok(()) };
        self.at = 1;
        match word.text {
            "if" | "elif" => {
                self.tuple(true)?;
            }
            "for" => self.for_loop()?,
            "set" => self.set()?,
            "macro" => {
                self.next()?;
                self.signature()?;
            }
            "call" => {
                if self.peek() == "(" {
                    self.signature()?;
                }
                self.expression(true)?;
            }
            "filter" => self.filter_chain()?,
            "with" => self.with()?,
            "autoescape" => return Err("`autoescape` is not known here".to_owned()),
            _ => return Ok(()),
        }
        self.expect_end()
    }

    fn filter_chain(&mut self) -> Result<(), String> {
        self.filter_name()?;
        while self.skip("|") {
            self.filter_name()?;
        }
        Ok(())
    }

    /// Skips what is assigned to, up to `end`; its names.
    fn targets(&mut self, ends: &[&str]) -> Vec<&str> {
        let mut names = Vec::new();
        while !ends.contains(&self.peek()) && !self.peek().is_empty() {
            if self.tokens[self.at].is_word() {
                names.push(self.peek());
            }
            self.at += 1;
        }
        names
    }

    fn for_loop(&mut self) -> Result<(), String> {
        self.targets(&["in"]);
        self.expect("in")?;
        let start = self.at;
        let (values, _) = self.tuple(false)?;
        let is_path = self.tokens[start..self.at].iter().all(|token| token.text == "." || token.is_word());
        if is_path && !self.code[values.start..values.end].contains(char::is_whitespace) {
            self.close(values.end, &format!("|{EACH}"));
        } else {
            self.filter(values, EACH);
        }
        if self.skip("if") {
            self.expression(true)?;
        }
        self.skip("recursive");
        Ok(())
    }

    fn set(&mut self) -> Result<(), String> {
        let first = self.at;
        self.targets(&["=", "|"]);
        let targets = &self.tokens[first..self.at];
        let is_kept = targets.iter().any(|token| token.text == ".");
        if let Some(pair) =
            targets.windows(2).find(|pair| pair[0].text == "." && pair[1].text.starts_with('_'))
        {
            return Err(format!("a namespace takes no name that begins with `_`: `{}`", pair[1].text));
        }
        if self.skip("=") {
            let (value, _) = self.tuple(true)?;
            if is_kept {
                self.filter(value, KEEP);
            }
            return Ok(());
        }
        if self.skip("|") {
            self.filter_chain()?;
            if is_kept && let Some(last) = self.at.checked_sub(1).map(|at| self.tokens[at].end()) {
                self.close(last, &format!("|{KEEP}"));
            }
        }
        Ok(())
    }

    /// Parameters in brackets. The engine gives none of them to the default of another.
    fn signature(&mut self) -> Result<(), String> {
        self.expect("(")?;
        let mut names: Vec<&str> = Vec::new();
        while self.peek() != ")" {
            let name = self.next()?;
            names.push(name.text);
            if self.skip("=") {
                let start = self.at;
                self.expression(true)?;
                let used = self.tokens[start..self.at].iter().find(|token| names.contains(&token.text));
                if let Some(used) = used {
                    return Err(format!("the default of a parameter uses the parameter `{}`", used.text));
                }
            }
            if !self.skip(",") {
                break;
            }
        }
        self.expect(")")?;
        Ok(())
    }

    /// Names with their values. Jinja2 takes all values from outside the block.
    fn with(&mut self) -> Result<(), String> {
        let mut names: Vec<String> = Vec::new();
        while !self.peek().is_empty() {
            let targets: Vec<String> = self.targets(&["="]).into_iter().map(str::to_owned).collect();
            self.expect("=")?;
            let start = self.at;
            self.expression(true)?;
            let used =
                self.tokens[start..self.at].iter().find(|token| names.iter().any(|name| name == token.text));
            if let Some(used) = used {
                return Err(format!("a value of `with` uses the name `{}`, which it sets", used.text));
            }
            names.extend(targets);
            if !self.skip(",") {
                break;
            }
        }
        Ok(())
    }
}
