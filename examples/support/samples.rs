//! Encoders of whatever architecture, with what they are to embed.

// Each example uses a part of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use ndarray::Array2;
use weightpress::checkpoint::{Checkpoint, Loader};
use weightpress::stats::Stats;

use super::bert::{Bert, paragraphs};
use super::dinov2::{Dinov2, Image};
use super::encoder::Encoder;
use super::llama::model_type;

/// Where samples are.
#[derive(Debug, Clone)]
pub struct Given {
    /// For encoders of sentences: so many of its first paragraphs of 60 to 400 characters.
    pub text: Option<PathBuf>,
    pub paragraphs: usize,
    /// For encoders of images: a folder of them.
    pub images: Option<PathBuf>,
}

impl Given {
    /// The text, which models of most kinds need.
    pub fn text(&self) -> Result<&Path> {
        self.text.as_deref().context("a model of this architecture needs --text")
    }
}

/// An encoder, and what it is to embed, which several of an architecture may share.
pub enum Samples {
    Sentences(Bert, Arc<[Vec<usize>]>),
    Images(Dinov2, Arc<[Image]>),
}

impl Samples {
    /// Whether a folder's model is an encoder.
    pub fn fit(checkpoint: &Checkpoint) -> Result<bool> {
        Ok(matches!(model_type(checkpoint)?.as_deref(), Some("bert" | "dinov2")))
    }

    /// Those of a Hugging Face folder; `None` if its model is no encoder.
    pub fn load(checkpoint: &Checkpoint, given: &Given) -> Result<Option<Self>> {
        Self::load_by(&mut checkpoint.loader()?, checkpoint, given)
    }

    /// The same by a loader of its weights.
    pub fn load_by(weights: &mut Loader<'_, f32>, checkpoint: &Checkpoint, given: &Given) -> Result<Option<Self>> {
        match model_type(checkpoint)?.as_deref() {
            Some("bert") => {
                let text = given.text()?;
                let model = Bert::load_by(weights, checkpoint)?;
                let sentences = paragraphs(checkpoint.root(), text, given.paragraphs)?;
                Ok(Some(Samples::Sentences(model, sentences.into())))
            }
            Some("dinov2") => {
                let folder = given.images.as_deref().context("an encoder of images needs --images")?;
                let model = Dinov2::load_by(weights, checkpoint)?;
                let images = model.images(folder)?;
                Ok(Some(Samples::Images(model, images.into())))
            }
            _ => Ok(None),
        }
    }

    /// The same samples for another model of the architecture.
    pub fn of(&self, weights: &mut Loader<'_, f32>, checkpoint: &Checkpoint) -> Result<Self> {
        Ok(match self {
            Samples::Sentences(_, samples) => Samples::Sentences(Bert::load_by(weights, checkpoint)?, samples.clone()),
            Samples::Images(_, samples) => Samples::Images(Dinov2::load_by(weights, checkpoint)?, samples.clone()),
        })
    }

    /// Tokens of each.
    pub fn tokens(&self) -> Vec<usize> {
        fn of<E: Encoder>(model: &E, samples: &[E::Sample]) -> Vec<usize> {
            samples.iter().map(|sample| model.tokens(sample)).collect()
        }
        match self {
            Samples::Sentences(model, samples) => of(model, samples),
            Samples::Images(model, samples) => of(model, samples),
        }
    }

    /// Blocks of the encoder.
    pub fn blocks(&self) -> usize {
        match self {
            Samples::Sentences(model, _) => model.layers().len(),
            Samples::Images(model, _) => model.layers().len(),
        }
    }

    /// As [`Encoder::embed_all`].
    pub fn embed(&self, done: &(dyn Fn(usize) + Sync)) -> Result<Array2<f32>> {
        match self {
            Samples::Sentences(model, samples) => model.embed_all(samples, done),
            Samples::Images(model, samples) => model.embed_all(samples, done),
        }
    }

    /// As [`Encoder::calibrate`].
    pub fn calibrate(&self, done: &dyn Fn(usize)) -> Result<Stats> {
        match self {
            Samples::Sentences(model, samples) => model.calibrate(samples, done),
            Samples::Images(model, samples) => model.calibrate(samples, done),
        }
    }

    /// As [`Encoder::fisher`].
    pub fn fisher(&self, probes: usize, done: &(dyn Fn(usize) + Sync)) -> Result<Stats> {
        match self {
            Samples::Sentences(model, samples) => model.fisher(samples, probes, done),
            Samples::Images(model, samples) => model.fisher(samples, probes, done),
        }
    }
}
