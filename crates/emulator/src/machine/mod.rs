//! The state of the machine that runs a program, and what is known of every part of it.

mod access;
mod barriers;
mod clocks;
mod global;
mod in_flight;
mod launch;
mod layout;
mod mbarriers;
mod shadow;
mod shared;
mod state;
mod status;
mod warp;

pub(crate) use access::{Access, AccessKind};
pub(crate) use barriers::{Barrier, Barriers};
pub(crate) use clocks::{Clocks, Stamp};
pub(crate) use global::{Global, MAX_BYTES};
pub(crate) use in_flight::{AsyncCopy, BulkLoad};
pub(crate) use launch::{Launch, PARAM_BASE, PARAM_BYTES};
pub(crate) use layout::{BASE, Layout};
pub(crate) use mbarriers::{Mbarrier, Mbarriers};
pub(crate) use shared::Shared;
pub(crate) use state::State;
pub(crate) use status::{Flow, Status};
pub(crate) use warp::{Hold, Warp};
