//! Compiled code on a GPU.

use std::ffi::CStr;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{CUfunction, CUmodule};

use crate::context::Context;
use crate::driver::{cu, report};
use crate::error::Result;

/// Compiled code, unloaded when this goes.
pub(crate) struct Module {
    raw: CUmodule,
    context: Arc<Context>,
}

// SAFETY: the handle is only passed to the driver, which lets any thread use it.
unsafe impl Send for Module {}
// SAFETY: as above; a shared reference offers nothing.
unsafe impl Sync for Module {}

impl Module {
    /// # Safety
    /// `raw` is a module of `context` that nobody else unloads.
    pub(crate) unsafe fn from_raw(raw: CUmodule, context: &Arc<Context>) -> Module {
        Module { raw, context: Arc::clone(context) }
    }

    /// Loads a cubin, as the driver made it, into `context`, which is current.
    pub(crate) fn load(cubin: &[u8], context: &Arc<Context>) -> Result<Module> {
        let mut raw = ptr::null_mut();
        // SAFETY: a whole cubin as the driver made it (the disk cache checks lengths and checksums), alive during the
        // call, which copies it.
        unsafe { cu!(cuModuleLoadData(&mut raw, cubin.as_ptr().cast())) }?;
        // SAFETY: the driver just handed the module over.
        Ok(unsafe { Module::from_raw(raw, context) })
    }

    /// The function of that name.
    pub(crate) fn function(self, entry: &CStr) -> Result<Function> {
        let mut raw = ptr::null_mut();
        // SAFETY: the module is alive, the name ends in NUL, and the pointer is to a local.
        unsafe { cu!(cuModuleGetFunction(&mut raw, self.raw, entry.as_ptr())) }?;
        Ok(Function { raw, module: self })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        report(self.context.enter().and_then(|_entered| {
            // SAFETY: loaded once, unloaded once, after the last kernel that has a function of it.
            unsafe { cu!(cuModuleUnload(self.raw)) }
        }));
    }
}

/// A function, and the module that it lives as long as.
pub(crate) struct Function {
    raw: CUfunction,
    module: Module,
}

// SAFETY: the driver lets any thread launch a function.
unsafe impl Send for Function {}
// SAFETY: as above; nothing changes a function once it is loaded.
unsafe impl Sync for Function {}

impl Function {
    pub(crate) fn raw(&self) -> CUfunction {
        self.raw
    }

    pub(crate) fn context(&self) -> &Context {
        &self.module.context
    }
}
