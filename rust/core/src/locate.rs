//! Where in a JSON text the value at a pointer stands.
//!
//! Used on the way to an error message only, on text that is known to be JSON.

/// The byte where the value at `pointer` (RFC 6901) begins; the closest container on the way where it does not exist.
pub(crate) fn offset_of(text: &[u8], pointer: &str) -> usize {
    let mut cursor = Cursor { text, at: 0 };
    cursor.skip_blank();
    for token in pointer.split('/').skip(1) {
        let token = token.replace("~1", "/").replace("~0", "~");
        let here = cursor.at;
        if cursor.enter(&token).is_none() {
            return here;
        }
    }
    cursor.at
}

struct Cursor<'t> {
    text: &'t [u8],
    at: usize,
}

impl Cursor<'_> {
    fn byte(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn skip_blank(&mut self) {
        while self.byte().is_some_and(|byte| byte.is_ascii_whitespace()) {
            self.at += 1;
        }
    }

    /// Moves from a container to the start of one of its values.
    fn enter(&mut self, token: &str) -> Option<()> {
        let is_object = match self.byte()? {
            b'{' => true,
            b'[' => false,
            _ => return None,
        };
        self.at += 1;
        let mut index = 0_usize;
        loop {
            self.skip_blank();
            let found = if is_object {
                let start = self.at;
                self.skip_value()?;
                let key: String = serde_json::from_slice(self.text.get(start..self.at)?).ok()?;
                self.skip_blank();
                self.at += 1; // the colon
                self.skip_blank();
                key == token
            } else {
                index.to_string() == token
            };
            if matches!(self.byte()?, b']' | b'}') {
                return None;
            }
            if found {
                return Some(());
            }
            self.skip_value()?;
            self.skip_blank();
            if self.byte()? != b',' {
                return None;
            }
            self.at += 1;
            index += 1;
        }
    }

    fn skip_value(&mut self) -> Option<()> {
        let mut depth = 0_u32;
        loop {
            match self.byte()? {
                b'"' => {
                    self.at += 1;
                    while self.byte()? != b'"' {
                        self.at += 1 + usize::from(self.byte()? == b'\\');
                    }
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' if depth == 0 => return None,
                b'}' | b']' => depth -= 1,
                b',' | b':' if depth == 0 => return Some(()),
                _ => {}
            }
            self.at += 1;
            if depth == 0
                && matches!(
                    self.byte(),
                    None | Some(b',' | b':' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t')
                )
            {
                return Some(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::offset_of;

    #[test]
    fn a_pointer_leads_to_its_value() {
        let text = br#"{"a,\"": [1, {"b": "x]"}], "messages" : [ {"role": "u"} , {"role":"bad"}]}"#;
        for (pointer, value) in [
            ("/a,\"/1/b", "\"x]\""),
            ("/messages/1", "{\"role\":\"bad\"}"),
            ("/messages/1/role", "\"bad\""),
            ("", "{"),
        ] {
            assert!(text[offset_of(text, pointer)..].starts_with(value.as_bytes()), "{pointer}");
        }
        assert!(text[offset_of(text, "/messages/1/none")..].starts_with(b"{\"role\":\"bad\"}"));
    }
}
