//! What a user lets be trained.

use std::str::FromStr;

use crate::{Error, ErrorKind, Result};

/// Which messages are trained.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum TrainOn {
    /// What the assistant says.
    #[default]
    Assistant,
    /// What the assistant says after the last message of the user.
    Last,
    /// All text, headers and questions too.
    All,
    /// What these roles say.
    Roles(Vec<&'static str>),
}

/// Which turns train the token that closes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainOnEos {
    /// Every trained turn.
    #[default]
    Turn,
    /// The last trained turn.
    Last,
    /// None: the model is not taught to stop.
    None,
}

/// What becomes of reasoning in the messages of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reasoning {
    /// The template renders it as it does.
    #[default]
    Keep,
    /// It is taken out before the template sees the row.
    Drop,
}

/// What becomes of a row some of whose words, reasoning, calls or tools the chat template leaves out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnLostContent {
    /// It is trained on, and counted.
    #[default]
    Warn,
    /// It is an error.
    Raise,
    /// It is left out, and counted.
    Skip,
}

/// All of these.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Controls {
    /// Which messages are trained.
    pub train_on: TrainOn,
    /// Which turns train the token that closes them.
    pub train_on_eos: TrainOnEos,
    /// An empty `<think></think>` is not trained.
    pub ignore_empty_think: bool,
    /// What becomes of reasoning.
    pub reasoning: Reasoning,
    /// What becomes of a row that loses something.
    pub on_lost_content: OnLostContent,
}

const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

impl FromStr for TrainOn {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "assistant" => Ok(Self::Assistant),
            "last" => Ok(Self::Last),
            "all" => Ok(Self::All),
            list => {
                let roles = list.split([',', ' ']).filter(|role| !role.is_empty()).map(|role| {
                    ROLES.into_iter().find(|&known| known == role).ok_or_else(|| {
                        unknown(
                            "train_on",
                            name,
                            "assistant, last, all, or roles (system, user, assistant, tool)",
                        )
                    })
                });
                roles.collect::<Result<_>>().map(Self::Roles)
            }
        }
    }
}

impl FromStr for TrainOnEos {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "turn" => Ok(Self::Turn),
            "last" => Ok(Self::Last),
            "none" => Ok(Self::None),
            _ => Err(unknown("train_on_eos", name, "turn, last or none")),
        }
    }
}

impl FromStr for Reasoning {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "keep" => Ok(Self::Keep),
            "drop" => Ok(Self::Drop),
            _ => Err(unknown("reasoning", name, "keep or drop")),
        }
    }
}

impl FromStr for OnLostContent {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "warn" => Ok(Self::Warn),
            "raise" => Ok(Self::Raise),
            "skip" => Ok(Self::Skip),
            _ => Err(unknown("on_lost_content", name, "warn, raise or skip")),
        }
    }
}

fn unknown(setting: &str, name: &str, expected: &str) -> Error {
    Error::new(ErrorKind::Config, format!("{setting} \"{name}\" is unknown; expected {expected}"))
}
