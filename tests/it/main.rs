//! One integration binary; its modules mirror `src`.

mod checkpoint;
mod stats;
