//! What is trained of random conversations under random templates: what the assistant says and calls, and its stop.
//!
//! A template is a [form](forms) that says by itself what it writes, so that nothing here knows how the core finds a turn.

mod trained_text {
    pub(crate) mod conversations;
    pub(crate) mod forms;
}

use std::fmt::Write as _;
use std::thread;

use proptest::prelude::*;
use sftcore::conversation::{Conversation, Message};
use sftcore::template::{ChatTemplate, Controls, Part, Rendered, TrainOnEos};

use trained_text::conversations::conversations;
use trained_text::forms::{Form, Written, forms};

fn conversation(messages: &[Message], is_thinking_off: bool) -> Conversation {
    let mut conversation = Conversation { messages: messages.to_vec(), ..Conversation::default() };
    if is_thinking_off {
        conversation.chat_template_kwargs.insert("enable_thinking".to_owned(), false.into());
    }
    conversation
}

/// The text with `«…»` round what is trained.
fn marked(text: &str, spans: impl Iterator<Item = (usize, usize)>) -> String {
    let mut marked = String::new();
    let mut at = 0;
    for (start, end) in spans.filter(|(start, end)| start < end) {
        let _ = write!(marked, "{}«{}»", &text[at..start], &text[start..end]);
        at = end;
    }
    (marked + &text[at..]).replace("»«", "")
}

fn found(rendered: &Rendered) -> String {
    let trained = rendered.segments.iter().filter(|segment| segment.is_trained());
    marked(&rendered.text, trained.map(|segment| (segment.start, segment.end)))
}

fn expected(written: &Written, messages: &[Message], train_on_eos: TrainOnEos) -> String {
    let trained: Vec<_> = written.turns.iter().filter(|turn| messages[turn.3].weight > 0.0).collect();
    let last = trained.last().map(|turn| turn.3);
    let spans = trained.iter().map(|&&(start, stop, end, message)| {
        let keeps_end = match train_on_eos {
            TrainOnEos::Turn => true,
            TrainOnEos::Last => Some(message) == last,
            TrainOnEos::None => false,
        };
        (start, if keeps_end { end } else { stop })
    });
    marked(&written.text, spans)
}

fn check(
    form: &Form,
    template: &ChatTemplate,
    messages: &[Message],
    is_thinking_off: bool,
) -> Result<(), TestCaseError> {
    let written = form.write(messages, is_thinking_off);
    let conversation = conversation(messages, is_thinking_off);
    for train_on_eos in [TrainOnEos::Turn, TrainOnEos::Last, TrainOnEos::None] {
        let controls = Controls { train_on_eos, ..Controls::default() };
        let rendered = match template.render_segments(&conversation, &controls) {
            Ok(rendered) => rendered,
            Err(error) if written.is_refused => {
                prop_assert!(error.to_string().contains("nothing but its end"), "{}", error);
                continue;
            }
            Err(error) => return Err(TestCaseError::fail(format!("{error}\n{}", form.source()))),
        };
        prop_assert!(!written.is_refused, "only an end is trained: {}", found(&rendered));
        prop_assert_eq!(found(&rendered), expected(&written, messages, train_on_eos), "{}", form.source());
        let mut lost: Vec<_> = rendered
            .lost
            .iter()
            .map(|lost| {
                let part = match lost.part {
                    Part::Content => "words",
                    Part::Reasoning => "reasoning",
                    Part::Call(_) => "calls",
                    Part::Tool(_) => "tools",
                };
                (lost.message, part)
            })
            .collect();
        lost.dedup();
        let mut missing = written.lost.clone();
        lost.sort_unstable();
        missing.sort_unstable();
        prop_assert_eq!(lost, missing, "{}", form.source());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// In any order of rows, first seen by one thread or by eight.
    #[test]
    fn what_the_assistant_says_is_trained(
        form in forms(),
        rows in prop::collection::vec((conversations(), any::<bool>()), 1..5),
        order in any::<bool>(),
    ) {
        let template = ChatTemplate::new(&form.source(), form.special_tokens()).expect("it compiles");
        let mut rows: Vec<_> = rows.iter().cycle().take(3 * rows.len()).collect();
        if order {
            rows.reverse();
        }
        for (messages, is_thinking_off) in &rows {
            check(&form, &template, messages, *is_thinking_off)?;
        }
        let shared = ChatTemplate::new(&form.source(), form.special_tokens()).expect("it compiles");
        thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| rows.iter().try_for_each(|(messages, off)| check(&form, &shared, messages, *off)))
                })
                .collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
        })?;
    }
}
