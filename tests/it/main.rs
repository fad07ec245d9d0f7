//! One integration binary; its modules mirror `src`.

mod checkpoint;
mod linalg;
mod recipe;
mod run;
mod stats;
