//! What is compared: lines of a TOML file, each a method with its metric and its allocation.

use std::path::Path;

use anyhow::{Context, Result};
use regex::Regex;
use serde::Deserialize;
use toml::{Table, Value};
use weightpress::Recipe;

/// One method. Everything but `name`, `baseline` and `keep` is a rule as recipes have it, without `match` and `budget`.
#[derive(Debug, Clone, Deserialize)]
pub struct Line {
    pub name: String,
    /// Whether it stays when other methods are given.
    #[serde(default)]
    pub baseline: bool,
    /// Of a form that has one size: the budget to run it with, once.
    pub keep: Option<f64>,
    #[serde(flatten)]
    rule: Table,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    line: Vec<Line>,
}

const OWN: &str = include_str!("lines.toml");

/// The baselines, and the lines of a file or else our own, as far as their names match.
pub fn read(file: Option<&Path>, only: Option<&str>) -> Result<Vec<Line>> {
    let own: File = toml::from_str(OWN)?;
    let (mut lines, mut others): (Vec<Line>, Vec<Line>) = own.line.into_iter().partition(|line| line.baseline);
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let given: File = toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        others = given.line;
    }
    let only = only.map(Regex::new).transpose().context("in --only")?;
    lines.extend(others.into_iter().filter(|line| only.as_ref().is_none_or(|only| only.is_match(&line.name))));
    Ok(lines)
}

/// A line at a budget.
pub fn recipe(line: &Line, pattern: &str, keep: f64) -> Result<Recipe> {
    let mut rule = line.rule.clone();
    rule.insert("match".into(), Value::String(pattern.into()));
    rule.insert("budget".into(), Value::Table(Table::from_iter([("keep".to_owned(), Value::Float(keep))])));
    let whole = Table::from_iter([("rule".to_owned(), Value::Array(vec![Value::Table(rule)]))]);
    Recipe::parse(&toml::to_string(&whole)?).with_context(|| format!("in line `{}`", line.name))
}
