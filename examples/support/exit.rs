//! What the command-line examples have in common: exit codes, and errors as one readable paragraph.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use anyhow::Result;
use weightpress::Error;

/// Exit code 0 if `done` is, 2 if the input or the request was refused, 1 if something failed on the
/// way (a file operation, a numerical kernel); what went wrong goes to standard error.
pub fn code(done: Result<()>) -> ExitCode {
    let Err(error) = done else { return ExitCode::SUCCESS };
    eprintln!("error: {}", paragraph(&error));
    let refused = error.downcast_ref::<Error>().is_none_or(Error::is_refusal);
    ExitCode::from(if refused { 2 } else { 1 })
}

/// The causes from the outermost in; one that the message before it quotes already is not repeated.
fn paragraph(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        match text.contains(&cause) {
            true => {}
            false if text.is_empty() => text = cause,
            false => text = format!("{text}: {cause}"),
        }
    }
    /// A list of refused tensors may be as long as the model has weights.
    const LINES: usize = 12;
    let count = text.lines().count();
    if count > LINES {
        let shown: Vec<&str> = text.lines().take(LINES - 1).collect();
        text = format!("{}\n  and {} more", shown.join("\n"), count - shown.len());
    }
    text
}

/// Writes the answer to standard output; a reader that has seen enough (`| head`) is no failure.
pub fn answer(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(why) if why.kind() != ErrorKind::BrokenPipe => Err(why.into()),
        _ => Ok(()),
    }
}
