//! What became of what the messages say: where contents went, and what is not in the text.

use super::marks;
use super::rendered::{Lost, Part};
use super::spans::Tracker;

impl Tracker<'_> {
    /// Where the content of each message went, whole or in pieces, and whether it is all there.
    pub(super) fn contents(&self) -> Vec<(Vec<(usize, usize)>, bool)> {
        let messages = self.conversation.messages.iter().enumerate();
        let content = messages.map(|(index, message)| {
            let core = marks::trim(message.content.as_deref().unwrap_or_default());
            let is_of = |number: &usize| {
                let stretch = &self.pieces.stretches[*number];
                stretch.message == index
                    && !matches!(stretch.part, Part::Call(_))
                    && (stretch.part == Part::Content || core.contains(stretch.text.as_str()))
            };
            let numbers: Vec<usize> = (0..self.pieces.stretches.len()).filter(is_of).collect();
            let found =
                self.pieces.list.iter().filter(|piece| numbers.contains(&piece.stretch) && piece.is_whole);
            let found: Vec<_> = found.copied().collect();
            // with the tags between its stretches, where they are in the text too
            let whole = found.iter().find_map(|piece| {
                let start = piece
                    .start
                    .checked_sub(core.find(self.pieces.stretches[piece.stretch].text.as_str())?)?;
                (self.text.get(start..start + core.len())? == core).then_some((start, start + core.len()))
            });
            if let Some(whole) = whole.filter(|_| !core.is_empty()) {
                return (vec![whole], true);
            }
            let is_all = numbers.iter().all(|number| found.iter().any(|piece| piece.stretch == *number));
            (found.iter().map(|piece| (piece.start, piece.end)).collect(), is_all)
        });
        content.collect()
    }

    /// What the row says and the text does not.
    pub(super) fn lost(&self) -> Vec<Lost> {
        let mut lost: Vec<Lost> = Vec::new();
        let stretches = self.pieces.stretches.iter().enumerate();
        for (number, stretch) in stretches.clone() {
            let (message, part) = (stretch.message, stretch.part);
            let role = self.conversation.messages[message].role;
            let found = Lost { message, role, part };
            // of a call, arguments may be written in another form
            let is_shown = match part {
                Part::Call(_) => stretches
                    .clone()
                    .filter(|(_, other)| other.message == message && other.part == part)
                    .any(|(number, _)| self.pieces.is_shown(number, self.text)),
                _ => self.pieces.is_shown(number, self.text),
            };
            if !is_shown && !lost.contains(&found) {
                lost.push(found);
            }
        }
        let tools = self.conversation.tools.as_ref().and_then(serde_json::Value::as_array);
        for (number, tool) in tools.into_iter().flatten().enumerate() {
            let name = tool.get("function").unwrap_or(tool).get("name").and_then(serde_json::Value::as_str);
            if name.is_some_and(|name| !self.text.contains(name)) {
                lost.push(Lost { message: 0, role: "", part: Part::Tool(number) });
            }
        }
        lost
    }
}
