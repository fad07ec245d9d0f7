//! A run's progress on standard error: a bar with the time left, or nothing when it is not a terminal.

use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};
use weightpress::run::Observer;

/// Shows one bar for each stage.
#[derive(Default)]
pub struct Bar {
    current: Mutex<Option<ProgressBar>>,
}

impl Observer for Bar {
    fn stage(&self, name: &str, work: u64) {
        let style = ProgressStyle::with_template("{prefix:>12} [{bar:40}] {percent:>3}%  {eta} left  {wide_msg}");
        let bar = ProgressBar::new(work.max(1)).with_prefix(name.to_owned());
        let bar = style.map_or(bar.clone(), |style| bar.with_style(style.progress_chars("=> ")));
        if let Ok(mut current) = self.current.lock()
            && let Some(old) = current.replace(bar)
        {
            old.finish_and_clear();
        }
    }
    fn advance(&self, work: u64, what: &str) {
        if let Ok(current) = self.current.lock()
            && let Some(bar) = &*current
        {
            bar.inc(work);
            bar.set_message(what.to_owned());
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Ok(mut current) = self.current.lock()
            && let Some(bar) = current.take()
        {
            bar.finish_and_clear();
        }
    }
}
