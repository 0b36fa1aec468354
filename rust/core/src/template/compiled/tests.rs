use std::path::Path;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::template::SpecialTokens;

/// A template that looks into contents in every way that is not by markup.
const CURIOUS: &str = "{% for m in messages %}{% set c = m['content'] %}{{ m['role'] }}: \
    {% if c == 'stop' %}[stopped]{% elif c.startswith('# ') %}{{ c[2:] | upper }}\
    {% elif 'secret' in c and 'word' in c %}***{% else %}{{ c.rstrip('.') }}{% endif %}\n{% endfor %}";

fn template(source: &str) -> Option<ChatTemplate> {
    let named = vec![("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())];
    let texts = vec!["<s>".to_owned(), "</s>".to_owned(), "<|im_end|>".to_owned()];
    ChatTemplate::new(source, SpecialTokens { named, texts, ..SpecialTokens::default() }).ok()
}

fn chat(turns: &[(&'static str, String)]) -> Conversation {
    let messages = turns.iter().map(|(role, content)| Message::new(role, content.as_str())).collect();
    Conversation { messages, ..Conversation::default() }
}

/// The packaged templates, and those of the shared data where it is there.
fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folders = [root.join("python/sftcore/templates"), root.join("../shared/data/templates")];
    let mut sources: Vec<(String, String)> = folders
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flatten()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let is_template = path.extension().is_some_and(|extension| extension == "jinja");
            let source = std::fs::read_to_string(&path).ok().filter(|_| is_template)?;
            Some((path.file_name()?.to_string_lossy().into_owned(), source))
        })
        .collect();
    assert!(sources.len() >= 15, "the packaged templates are missing");
    sources.push(("curious".to_owned(), CURIOUS.to_owned()));
    sources.sort();
    sources
}

/// Renders until the shape is known; the compiled render must be that of Jinja. Whether it was used.
fn check(template: &ChatTemplate, conversation: &Conversation, controls: &Controls) -> bool {
    let compiled = (0..3).filter_map(|_| template.compiled.render(template, conversation, controls)).last();
    let Some(compiled) = compiled else { return false };
    let found = template.follow(conversation, controls).expect("Jinja renders what the compiled form does");
    assert_eq!(compiled, found.into_rendered(controls));
    true
}

#[test]
fn compiled_renders_are_those_of_jinja() {
    let sources = sources();
    let used = std::cell::Cell::new(0);
    for (name, source) in &sources {
        let Some(template) = template(source) else { continue };
        let mut runner = TestRunner::new_with_rng(
            Config { failure_persistence: None, ..Config::with_cases(24) },
            proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
        );
        let mut literals = string_literals(source);
        literals.extend(["<|im_end|>", "</s>", "<think>", "</think>", ""].map(str::to_owned));
        let words = string_literals(source).into_iter().filter(|literal| !looks_like_markup(literal));
        let words = words.chain(ODD_CONTENTS.map(str::to_owned)).collect::<Vec<_>>();
        let piece = prop_oneof![1 => select(literals), 40 => select(words), 10 => ".{0,12}"];
        let content = prop::collection::vec(piece, 1..4).prop_map(|pieces| pieces.concat());
        let row = (any::<bool>(), prop::collection::vec((content.clone(), content.clone()), 1..4), content);
        let outcome = runner.run(&row, |(has_system, pairs, system)| {
            let mut turns = if has_system { vec![("system", system)] } else { Vec::new() };
            turns.extend(pairs.into_iter().flat_map(|(one, two)| [("user", one), ("assistant", two)]));
            used.set(used.get() + usize::from(check(&template, &chat(&turns), &Controls::default())));
            Ok(())
        });
        if let Err(error) = outcome {
            panic!("{name}: {error}");
        }
    }
    assert!(used.get() > sources.len(), "only {used:?} chats of {} templates were compiled", sources.len());
}

#[test]
fn white_space_of_one_turn_says_nothing_about_another() {
    let template = template("{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let turns = [("assistant", " a"), ("user", "b "), ("assistant", "c")];
    let conversation = chat(&turns.map(|(role, text)| (role, text.to_owned())));
    let rendered = template.render_segments(&conversation, &Controls::default()).unwrap();
    let trained = rendered.segments.iter().filter(|segment| segment.is_trained());
    assert_eq!(
        trained.map(|segment| &rendered.text[segment.start..segment.end]).collect::<Vec<_>>(),
        [" a", "c"]
    );
    assert!(check(&template, &conversation, &Controls::default()));
}

#[test]
fn what_a_template_looks_for_goes_through_jinja() {
    let template = template(CURIOUS).unwrap();
    let controls = Controls::default();
    let form = template.compiled_form(&controls);
    assert!(form.is_plain);
    assert!(form.end_triggers.contains(&'.') && form.end_triggers.contains(&'#'), "{form:?}");
    assert!(form.triggers.iter().any(|trigger| trigger == "secret"), "{form:?}");
    let answer = |text: &str| chat(&[("user", "Hi".to_owned()), ("assistant", text.to_owned())]);
    for plain in ["Bye", "Two\nlines, with . and # in the middle", "\tindented\t"] {
        assert!(check(&template, &answer(plain), &controls), "{plain}");
    }
    for seen in ["stop", "# Title", "a secret word", "The end.", "a \u{fdd0} within"] {
        assert!(!check(&template, &answer(seen), &controls), "{seen}");
    }
}

#[test]
fn rows_with_more_than_plain_messages_go_through_jinja() {
    let mut with_tools = chat(&[("user", "Hi".to_owned()), ("assistant", "Hello".to_owned())]);
    assert_eq!(shape_key(&with_tools).as_deref(), Some(b"ua".as_slice()));
    let mut weighted = with_tools.clone();
    weighted.messages[0].weight = f32::from_be_bytes(*b"aaaa");
    assert_eq!(shape_key(&weighted).as_deref(), Some(b"Uaaaaa".as_slice()));
    let mut blank = with_tools.clone();
    blank.messages[0].content = Some(" \n".to_owned());
    let mut named = with_tools.clone();
    named.messages[0].extra.insert("name".to_owned(), "Ann".into());
    with_tools.tools = Some(serde_json::json!([]));
    for conversation in [with_tools, blank, named] {
        assert_eq!(shape_key(&conversation), None);
    }
}
