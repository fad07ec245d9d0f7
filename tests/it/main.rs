//! One integration binary; its modules mirror `src`.

mod checkpoint;
mod factorize;
mod recipe;
mod run;
mod stats;
