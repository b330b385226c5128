//! What a launch passes, checked against what the kernel takes.

use std::ffi::c_void;
use std::ptr;

use sage_ptx::{Arg, Param, ParamType};

use crate::error::{Error, Result};

/// Most parameters of a kernel. The pointers to a launch's arguments lie on the stack.
pub(crate) const MAX_PARAMS: usize = 72;

/// Most bytes of parameters, on GPUs and drivers of every age.
pub(crate) const MAX_PARAM_BYTES: usize = 4096;

/// Largest grid in each dimension, on every GPU since 2012.
const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];

/// Checks the count and the types of `args`.
pub(crate) fn check(kernel: &str, params: &[Param], args: &[Arg]) -> Result<()> {
    let fits = params.len() == args.len() && params.iter().zip(args).all(|(param, arg)| param.ty == arg.ty());
    if fits { Ok(()) } else { Err(explain(kernel, params, args)) }
}

#[cold]
fn explain(kernel: &str, params: &[Param], args: &[Arg]) -> Error {
    let wrong = params.iter().zip(args).position(|(param, arg)| param.ty != arg.ty());
    let index = wrong.unwrap_or(params.len().min(args.len()));
    let (param, arg) = (params.get(index), args.get(index));
    let count = params.len();
    Error::Argument {
        kernel: kernel.to_owned(),
        index,
        name: param.map_or_else(String::new, |param| param.name.clone()),
        found: arg.map_or_else(|| "missing".into(), |arg| describe(arg.ty()).into()),
        wanted: param.map_or_else(
            || format!("no more than {count} argument{}", if count == 1 { "" } else { "s" }),
            |param| describe(param.ty).into(),
        ),
    }
}

fn describe(ty: ParamType) -> &'static str {
    match ty {
        ParamType::Pointer => "a pointer",
        ParamType::U32 => "a u32",
        ParamType::I32 => "an i32",
        ParamType::I64 => "an i64",
        ParamType::F32 => "an f32",
        ParamType::TensorMap => "a tensor map",
    }
}

/// Pointers to the values of `args`, as the driver wants them. [`check`] has found that they fit.
pub(crate) fn pointers(args: &[Arg]) -> [*mut c_void; MAX_PARAMS] {
    let mut pointers = [ptr::null_mut(); MAX_PARAMS];
    for (pointer, arg) in pointers.iter_mut().zip(args) {
        let value: *const c_void = match arg {
            Arg::Pointer(value) => ptr::from_ref(value).cast(),
            Arg::U32(value) => ptr::from_ref(value).cast(),
            Arg::I32(value) => ptr::from_ref(value).cast(),
            Arg::I64(value) => ptr::from_ref(value).cast(),
            Arg::F32(value) => ptr::from_ref(value).cast(),
            Arg::TensorMap(value) => ptr::from_ref(value).cast(),
        };
        // The driver's signature lacks a `const`; it only reads.
        *pointer = value.cast_mut();
    }
    pointers
}

/// Checks a grid of thread blocks, which comes in whole clusters.
pub(crate) fn check_grid(kernel: &str, grid: [u32; 3], cluster: Option<[u32; 3]>) -> Result<()> {
    for (axis, ((blocks, limit), name)) in grid.into_iter().zip(MAX_GRID).zip(["x", "y", "z"]).enumerate() {
        if blocks > limit {
            return Err(Error::limit(kernel, format!("grid {name}"), blocks, format!("at most {limit}")));
        }
        let cluster = cluster.map_or(1, |cluster| cluster[axis]);
        if !blocks.is_multiple_of(cluster) {
            let wanted = format!("a multiple of the cluster's {cluster}");
            return Err(Error::limit(kernel, format!("grid {name}"), blocks, wanted));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use sage_ptx::TensorMapBytes;

    use super::*;

    fn params() -> Vec<Param> {
        let param = |name: &str, ty| Param { name: name.into(), ty };
        vec![param("x", ParamType::Pointer), param("rows", ParamType::U32), param("scale", ParamType::F32)]
    }

    fn message(args: &[Arg]) -> String {
        check("softmax", &params(), args).unwrap_err().to_string()
    }

    #[test]
    fn fitting_arguments_pass() {
        check("softmax", &params(), &[Arg::Pointer(0), Arg::U32(3), Arg::F32(1.0)]).unwrap();
        check("nothing", &[], &[]).unwrap();
    }

    #[test]
    fn wrong_arguments_are_named() {
        assert_eq!(
            message(&[Arg::Pointer(0), Arg::I32(3), Arg::F32(1.0)]),
            "kernel `softmax`: argument 1 (`rows`) is an i32, expected a u32"
        );
        assert_eq!(
            message(&[Arg::Pointer(0), Arg::U32(3)]),
            "kernel `softmax`: argument 2 (`scale`) is missing, expected an f32"
        );
        assert_eq!(
            message(&[Arg::Pointer(0), Arg::U32(3), Arg::F32(1.0), Arg::I64(1)]),
            "kernel `softmax`: argument 3 is an i64, expected no more than 3 arguments"
        );
        // The first that is wrong is the one to look at, also when there are too few.
        assert_eq!(
            message(&[Arg::TensorMap(TensorMapBytes([0; 16]))]),
            "kernel `softmax`: argument 0 (`x`) is a tensor map, expected a pointer"
        );
    }

    #[test]
    fn every_pointer_leads_to_its_value() {
        let map = TensorMapBytes(std::array::from_fn(|i| i as u64));
        let args = [
            Arg::Pointer(1 << 40),
            Arg::U32(u32::MAX),
            Arg::I32(-2),
            Arg::I64(-3),
            Arg::F32(0.5),
            Arg::TensorMap(map),
        ];
        let pointers = pointers(&args);
        // SAFETY: each points to the value in `args`, of the type that stands there.
        unsafe {
            assert_eq!(*pointers[0].cast::<u64>(), 1 << 40);
            assert_eq!(*pointers[1].cast::<u32>(), u32::MAX);
            assert_eq!(*pointers[2].cast::<i32>(), -2);
            assert_eq!(*pointers[3].cast::<i64>(), -3);
            assert_eq!(*pointers[4].cast::<f32>(), 0.5);
            assert_eq!(*pointers[5].cast::<[u64; 16]>(), map.0);
        }
        assert!(pointers[5].addr().is_multiple_of(64), "the driver wants tensor maps aligned");
        assert!(pointers[6..].iter().all(|pointer| pointer.is_null()));
    }

    #[test]
    fn grids_have_limits() {
        let message = |grid, cluster| check_grid("k", grid, cluster).unwrap_err().to_string();
        check_grid("k", MAX_GRID, None).unwrap();
        check_grid("k", [0, 0, 0], Some([2, 1, 1])).unwrap();
        check_grid("k", [6, 5, 1], Some([2, 1, 1])).unwrap();
        assert_eq!(
            message([1 << 31, 1, 1], None),
            "kernel `k`: grid x is 2147483648, expected at most 2147483647"
        );
        assert_eq!(message([1, 65536, 1], None), "kernel `k`: grid y is 65536, expected at most 65535");
        assert_eq!(message([1, 1, 65536], None), "kernel `k`: grid z is 65536, expected at most 65535");
        assert_eq!(
            message([7, 1, 1], Some([2, 1, 1])),
            "kernel `k`: grid x is 7, expected a multiple of the cluster's 2"
        );
    }
}
