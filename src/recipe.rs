//! What to do with which weights, as data: a recipe is a TOML file, or the same thing in Rust.

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::allocate::Allocate;
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::factorize::Method;
use crate::metric::MetricSpec;
use crate::named;

/// A list of rules; the first one that matches a tensor's name decides.
///
/// ```
/// let recipe = weightpress::Recipe::parse(r#"
///     [[rule]]
///     match = 'model\.layers\.\d+\..*_proj\.weight'
///     method = "svd"
///     metric = "gram"
///     budget = { keep = 0.8 }
///     allocate = "global"
/// "#)?;
/// assert_eq!(recipe.rules.len(), 1);
/// # Ok::<(), weightpress::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Seed of whatever is random; each group's own seed derives from it and the group's name.
    #[serde(default)]
    pub seed: u64,
    /// Regular expressions (matching the whole name) of tensors to leave as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// The rules, in order.
    #[serde(rename = "rule")]
    pub rules: Vec<Rule>,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// A regular expression that matches the whole name of a tensor.
    #[serde(rename = "match")]
    pub pattern: String,
    /// The structure of the answer.
    pub method: Method,
    /// The error that counts.
    #[serde(default)]
    pub metric: MetricSpec,
    /// What it may cost.
    pub budget: Budget,
    /// How the budget is spread over the weights that match.
    #[serde(default, deserialize_with = "named::deserialize")]
    pub allocate: Allocate,
    /// Weights for which this template (`$1` is the first capture of `match`) reads the same form one group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// What to do with a weight that cannot be compressed as asked.
    #[serde(default)]
    pub on_error: OnError,
}

/// What to do with a weight that cannot be compressed as the rule asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// Refuse the whole plan, or end the run; what is finished is kept for a resumed one.
    #[default]
    Fail,
    /// Keep that weight as it is; the report says why.
    KeepDense,
}

impl Rule {
    /// A rule with the plain metric, its budget for each weight alone.
    pub fn new(pattern: impl Into<String>, method: Method, budget: Budget) -> Self {
        Rule {
            pattern: pattern.into(),
            method,
            metric: MetricSpec::default(),
            budget,
            allocate: Allocate::Uniform,
            group: None,
            on_error: OnError::Fail,
        }
    }
}

impl Rule {
    /// Whether a weight that met this error stays dense, rather than ending the run.
    pub(crate) fn may_keep(&self, error: &Error) -> bool {
        self.on_error == OnError::KeepDense && !matches!(error, Error::Io { .. } | Error::Cancelled)
    }
}

impl Recipe {
    /// Reads TOML.
    ///
    /// # Errors
    /// [`Error::Recipe`] with line, column and, for an unknown name, the valid ones.
    pub fn parse(text: &str) -> Result<Self> {
        let recipe: Recipe = toml::from_str(text).map_err(|e| {
            let at = e.span().map(|span| {
                let before = &text[..span.start.min(text.len())];
                (before.matches('\n').count() + 1, before.chars().rev().take_while(|&c| c != '\n').count() + 1)
            });
            Error::Recipe { at, detail: e.message().to_owned() }
        })?;
        recipe.check()?;
        Ok(recipe)
    }

    /// Writes TOML that [`parse`](Self::parse) reads back as the same recipe.
    ///
    /// # Errors
    /// [`Error::Recipe`] if a number does not fit TOML (a seed above i64::MAX).
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Recipe { at: None, detail: e.to_string() })
    }

    /// What parsing cannot see: budgets, regular expressions, rules that contradict themselves.
    ///
    /// # Errors
    /// [`Error::Recipe`].
    pub fn check(&self) -> Result<()> {
        let refuse = |detail: String| Error::Recipe { at: None, detail };
        if self.rules.is_empty() {
            return Err(refuse("no [[rule]]: nothing to do".into()));
        }
        for pattern in &self.exclude {
            whole(pattern)?;
        }
        for (index, rule) in self.rules.iter().enumerate() {
            let refuse = |detail: String| refuse(format!("rule {}: {detail}", index + 1));
            whole(&rule.pattern)?;
            rule.budget.check().map_err(|e| refuse(e.to_string()))?;
            if rule.allocate != Allocate::Uniform && rule.budget.byte_limit(1).is_none() {
                return Err(refuse(format!(
                    "a global allocation spreads bytes: `{}` gives none; use keep or bytes",
                    rule.budget
                )));
            }
        }
        Ok(())
    }
}

/// Compiles a pattern that must match a whole name.
pub(crate) fn whole(pattern: &str) -> Result<Regex> {
    Regex::new(&format!("^(?:{pattern})$"))
        .map_err(|e| Error::Recipe { at: None, detail: format!("pattern `{pattern}`: {e}") })
}
