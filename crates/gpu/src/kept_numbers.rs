//! Lists of numbers that callers have in the host's memory, and kernels read in a GPU's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sage_core::Result;
use sage_cuda::{Buffer, Stream};

use crate::{Cuda, driver};

/// Most lists that stay in a GPU's memory: a model's layers have a few each.
const MOST_LISTS: usize = 4096;

/// Most numbers of a list that stays: more than there are heads, or blocks of a padded sequence.
const MOST_NUMBERS: usize = 1 << 14;

/// Lists of numbers in a GPU's memory. What is there stays there: later calls copy nothing and wait for nothing, and
/// graphs may hold its address.
#[derive(Debug, Default)]
pub(crate) struct KeptNumbers(Mutex<HashMap<Vec<u32>, Arc<Buffer>>>);

impl KeptNumbers {
    /// The numbers with these bits. A list that is new is copied, which waits for the copy, and cannot be part of a
    /// graph; where no more can stay it is copied for this call alone, in the order of `stream`.
    pub fn get(&self, gpu: &Cuda, stream: &Stream, bits: &[u32]) -> Result<Arc<Buffer>> {
        let mut lists = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = lists.get(bits) {
            return Ok(list.clone());
        }
        if lists.len() >= MOST_LISTS || bits.len() > MOST_NUMBERS {
            return Ok(Arc::new(Buffer::from_slice(stream, bits).map_err(driver)?));
        }
        // On a stream of its own: the caller's may end before others read the list.
        let list = Arc::new(Buffer::from_slice(&gpu.stream()?, bits).map_err(driver)?);
        lists.insert(bits.to_vec(), list.clone());
        Ok(list)
    }
}
