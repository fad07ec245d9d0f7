//! What each job of a run may spend: its rule's budget, or its share of a global one.

use std::collections::BTreeMap;
use std::fs;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Run;
use crate::allocate::{Allocate, Offer, allocate};
use crate::budget::Budget;
use crate::checkpoint::write_file_atomic;
use crate::error::Result;
use crate::factorize::Point;
use crate::plan::Job;
use crate::unit::{Curve, Worker};

/// What a job gets.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Share {
    Budget(Budget),
    /// It stays dense, for this reason.
    Kept(String),
}

/// shares.json: what was decided, and under which sensitivities of the jobs with a part in it.
#[derive(Debug, Serialize, Deserialize)]
struct Decided {
    sensitivities: Vec<f64>,
    shares: Vec<Share>,
}

impl Run<'_, '_> {
    /// What each job gets: the rule's own budget, or its share of a global one.
    pub(super) fn shares(&self, worker: &Worker<'_, '_>) -> Result<Vec<Share>> {
        let jobs = &self.plan.jobs;
        let own = |job: &Job| job.kept.clone().map_or(Share::Budget(job.budget), Share::Kept);
        let mut shares: Vec<Share> = jobs.iter().map(own).collect();
        let rules = &self.plan.recipe.rules;
        let global = |rule: usize| match rules[rule].allocate {
            Allocate::Global(global) => Some(global),
            Allocate::Uniform => None,
        };
        let open: Vec<usize> =
            (0..jobs.len()).filter(|&i| jobs[i].kept.is_none() && global(jobs[i].rule).is_some()).collect();
        if open.is_empty() {
            return Ok(shares);
        }
        let decided = self.work().join("shares.json");
        let sensitivities = open.iter().map(|&i| self.sensitivity(&jobs[i])).collect::<Result<Vec<f64>>>()?;
        let known: Option<Decided> = fs::read(&decided).ok().and_then(|text| serde_json::from_slice(&text).ok());
        if let Some(known) = known.filter(|known| known.sensitivities == sensitivities) {
            return Ok(known.shares);
        }
        self.observer.stage("measuring", open.iter().map(|&i| jobs[i].cost()).sum());
        let measured = open.par_iter().map(|&index| {
            self.check_cancelled()?;
            let curve = match worker.curve(index) {
                Err(why) if rules[jobs[index].rule].may_keep(&why) => Err(why.to_string()),
                curve => Ok(curve.map_err(|e| e.of_tensor(jobs[index].names.join(", ")))?),
            };
            self.observer.advance(jobs[index].cost(), &jobs[index].names[0]);
            Ok((index, curve))
        });
        let mut curves: BTreeMap<usize, Curve> = BTreeMap::new();
        for (index, curve) in measured.collect::<Result<Vec<_>>>()? {
            match curve {
                Ok(curve) => drop(curves.insert(index, curve)),
                Err(why) => shares[index] = Share::Kept(why),
            }
        }
        for (rule_index, rule) in rules.iter().enumerate() {
            let Some(global) = global(rule_index) else { continue };
            // Weights that turned out to stay dense spend their bytes of the common budget.
            let all = jobs.iter().enumerate().filter(|(_, job)| job.rule == rule_index);
            let before: u64 = all.clone().map(|(_, job)| job.bytes()).sum();
            let kept: u64 = all.filter(|(i, _)| !curves.contains_key(i)).map(|(_, job)| job.bytes()).sum();
            let Some(limit) = rule.budget.byte_limit(before) else { continue };
            // The uniform share is that of the bytes which are left for the others.
            let (limit, before) = (limit.saturating_sub(kept), before - kept);
            let members: Vec<(usize, &Curve)> =
                curves.iter().filter(|(i, _)| jobs[**i].rule == rule_index).map(|(i, c)| (*i, c)).collect();
            let points = members.iter().map(|(i, curve)| {
                let sensitivity = self.sensitivity(&jobs[*i])?;
                Ok(curve.choices(&global, &rule.metric, sensitivity))
            });
            let points: Vec<Vec<Point>> = points.collect::<Result<_>>()?;
            let offers = members.iter().zip(&points).map(|((i, _), points)| Offer {
                curve: points,
                floor: (jobs[*i].bytes() as f64 * global.floor * limit as f64 / before.max(1) as f64) as u64,
            });
            let chosen = allocate(&offers.collect::<Vec<_>>(), limit)?;
            for (((i, _), points), choice) in members.iter().zip(&points).zip(chosen) {
                shares[*i] = Share::Budget(Budget::Bytes(points[choice].bytes));
            }
        }
        let all = Decided { sensitivities, shares };
        let text = serde_json::to_vec(&all).map_err(|e| self.refuse(e.to_string()))?;
        write_file_atomic(&decided, &text)?;
        Ok(all.shares)
    }

    /// The mean over a group, whose errors are known in sum only.
    fn sensitivity(&self, job: &Job) -> Result<f64> {
        let each = job.names.iter().map(|name| self.plan.stats.sensitivity(name));
        Ok(each.sum::<Result<f64>>()? / job.names.len().max(1) as f64)
    }
}
