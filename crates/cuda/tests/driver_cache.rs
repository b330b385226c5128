//! Where the driver remembers what it compiles as a whole, and that it is given a folder where it has none: with a fake
//! driver, in a process of its own.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

use std::env;

use sage_cuda::{Driver, arrange_driver_cache, driver_cache, driver_cache_folder};

#[path = "fake_driver/forked.rs"]
mod forked;
#[path = "fake_driver/harness.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod harness;

use forked::in_a_fork;
use harness::cases;

cases! {
    a_driver_that_can_write_nowhere_is_given_a_folder, ["named", "whole"], "", {
        let own = tempfile::tempdir().unwrap();
        let set = |name, value: Option<&std::path::Path>| match value {
            // SAFETY: this process has no other thread that reads the environment.
            Some(value) => unsafe { env::set_var(name, value) },
            // SAFETY: as above.
            None => unsafe { env::remove_var(name) },
        };
        let variables = ["CUDA_CACHE_PATH", "CUDA_CACHE_DISABLE", "CUDA_CACHE_MAXSIZE"];
        variables.into_iter().for_each(|name| set(name, None));
        set("SAGEATTENTION_CACHE_DIR", Some(own.path()));
        let home = tempfile::tempdir().unwrap();
        set("HOME", Some(home.path()));
        assert_eq!(driver_cache(), Ok(home.path().join(".nv/ComputeCache")));
        assert_eq!(driver_cache_folder(), None, "the driver has its own");
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "which is left as it was");

        // A place where nobody can write, root neither.
        set("HOME", Some("/proc".as_ref()));
        let ours = own.path().join("driver");
        assert!(driver_cache().unwrap_err().starts_with("/proc/.nv/ComputeCache: "));
        assert_eq!(driver_cache_folder(), Some(ours.clone()));
        let chosen = || env::var_os("CUDA_CACHE_PATH");
        arrange_driver_cache();
        assert_eq!(chosen(), None, "this thread is not the only one");
        // A forked process has one thread.
        in_a_fork(|| {
            arrange_driver_cache();
            chosen().as_deref() == Some(ours.as_os_str()) && driver_cache().as_ref() == Ok(&ours)
        });
        for (name, value) in [("CUDA_CACHE_PATH", "/proc/chosen"), ("CUDA_CACHE_DISABLE", "1")] {
            in_a_fork(|| {
                set(name, Some(value.as_ref()));
                let before = chosen();
                arrange_driver_cache();
                chosen() == before && driver_cache_folder().is_none() && driver_cache().is_err()
            });
        }
        Driver::get().unwrap();
        assert_eq!(driver_cache_folder(), None, "it would come too late");
        in_a_fork(|| {
            arrange_driver_cache();
            chosen().is_none()
        });
    }
}
