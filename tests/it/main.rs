//! One integration binary; its modules mirror `src`.

mod checkpoint;
mod recipe;
mod run;
mod stats;
