//! How much of each data set an epoch takes.

use std::str::FromStr;

use super::Rows;
use crate::{Error, ErrorKind, Result};

/// What shares are counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MixBy {
    /// Rows.
    Rows,
    /// Trained tokens.
    Tokens,
}

impl FromStr for MixBy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "rows" => Ok(Self::Rows),
            "tokens" => Ok(Self::Tokens),
            _ => Err(unknown("mix_by", name, "rows or tokens")),
        }
    }
}

/// When an epoch of mixed data sets ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stopping {
    /// When the first data set is used up: no row comes twice.
    FirstExhausted,
    /// When the last one is used up: the others come again.
    AllExhausted,
}

impl FromStr for Stopping {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "first_exhausted" => Ok(Self::FirstExhausted),
            "all_exhausted" => Ok(Self::AllExhausted),
            _ => Err(unknown("stopping_strategy", name, "first_exhausted or all_exhausted")),
        }
    }
}

fn unknown(setting: &str, name: &str, expected: &str) -> Error {
    Error::new(ErrorKind::Config, format!("{setting} \"{name}\" is unknown; expected {expected}"))
}

/// How data sets share an epoch.
#[derive(Debug, Clone)]
pub struct Mixture {
    /// The share of each; without shares an epoch is all rows once.
    pub shares: Option<Vec<f64>>,
    /// What the shares are of.
    pub by: MixBy,
    /// When an epoch ends.
    pub stopping: Stopping,
}

pub(super) fn check_shares(sets: &[Rows], shares: &[f64]) -> Result<()> {
    let message = if shares.len() != sets.len() {
        format!("{} shares for {} data sets; expected one each", shares.len(), sets.len())
    } else if let Some(share) = shares.iter().find(|share| !(share.is_finite() && **share > 0.0)) {
        format!("a share of {share}; expected numbers above 0 (leave a data set out instead)")
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Config, format!("mix: {message}")))
}

/// How much of each data set an epoch takes, in the unit of `available`.
pub(super) fn quotas(available: &[u64], shares: &[f64], stopping: Stopping) -> Vec<f64> {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    let totals = available.iter().zip(shares).map(|(&have, share)| have as f64 / share);
    let total = match stopping {
        Stopping::FirstExhausted => totals.fold(f64::INFINITY, f64::min),
        Stopping::AllExhausted => totals.fold(0.0, f64::max),
    };
    shares.iter().map(|share| share * total).collect()
}
