//! Parameters of kernels: declared once, for the kernel that reads them and the host that passes them.

/// Declares a kernel's parameters as two structs with the same fields: the values inside the kernel, and the numbers
/// that a launch passes.
///
/// Field kinds: `[T]` is an array of `T` in device memory (an address for the host), `i32`, `i64` and `f32` are
/// numbers, `(tensor N)` is a tensor with N strides ([`TensorParam`](crate::tensor::TensorParam),
/// [`TensorArg`](crate::tensor::TensorArg)), and `input` one whose rows are sequences': the fields of
/// [`InputParams`](crate::preprocess::InputParams). `pool` is a KV cache's: [`PoolParams`](crate::decode::PoolParams).
/// `per_head` is a number that heads may have of their own: [`PerHeadParam`](crate::predict::PerHeadParam). `tokens`
/// says which tokens are whose: [`TokensParams`](crate::predict::TokensParams), and `lengths` which rows are a sequence's:
/// [`LengthParams`](crate::sequence::LengthParams). `sinks` are attention sinks, which few kernels have: those declare them
/// after all else ([`SinkParams`](crate::sinks::SinkParams)), and their launches pass them last.
macro_rules! kernel_params {
    (
        $(#[$doc:meta])*
        $inside:ident, $outside:ident {
            $($(#[$field_doc:meta])* $field:ident: $kind:tt,)*
        }
    ) => {
        #[doc = concat!("Inside the kernel: ", stringify!($outside), ".")]
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct $inside<'k> {
            $($(#[$field_doc])* #[allow(dead_code, reason = "not every variant reads every parameter")]
            pub $field: $crate::params::inside!($kind),)*
        }

        impl<'k> $inside<'k> {
            /// Declares the parameters, in the order of the host's struct.
            pub(crate) fn declare(code: &'k sage_ptx::Code) -> Self {
                $inside { $($field: $crate::params::declare!(code, $kind, stringify!($field)),)* }
            }
        }

        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq)]
        pub struct $outside {
            $($(#[$field_doc])* pub $field: $crate::params::outside!($kind),)*
        }

        impl $outside {
            /// Number of parameters.
            pub const COUNT: usize = 0 $(+ $crate::params::count!($kind))*;

            /// The values in the kernel's order.
            pub fn args(&self) -> [sage_ptx::Arg; Self::COUNT] {
                let mut args = [sage_ptx::Arg::I32(0); Self::COUNT];
                let mut rest = args.as_mut_slice();
                $(
                    let (own, after) = rest.split_at_mut($crate::params::count!($kind));
                    own.copy_from_slice(&$crate::params::arg!($kind, self.$field));
                    rest = after;
                )*
                debug_assert!(rest.is_empty());
                args
            }
        }
    };
}

macro_rules! inside {
    ((tensor $n:literal)) => { $crate::tensor::TensorParam<'k, $n> };
    (input) => { $crate::preprocess::InputParams<'k> };
    (pool) => { $crate::decode::PoolParams<'k> };
    (per_head) => { $crate::predict::PerHeadParam<'k> };
    (tokens) => { $crate::predict::TokensParams<'k> };
    (lengths) => { $crate::sequence::LengthParams<'k> };
    (sinks) => { Option<$crate::sinks::SinkParams<'k>> };
    ([$element:ty]) => { sage_ptx::Global<'k, $element> };
    ($scalar:ty) => { sage_ptx::Val<'k, $scalar> };
}

macro_rules! outside {
    ((tensor $n:literal)) => {
        $crate::tensor::TensorArg<$n>
    };
    (input) => {
        $crate::preprocess::InputArgs
    };
    (pool) => {
        $crate::decode::PoolTensors
    };
    (per_head) => {
        $crate::predict::PerHeadArg
    };
    (tokens) => {
        $crate::predict::TokensArgs
    };
    (lengths) => {
        $crate::sequence::LengthArgs
    };
    (sinks) => {
        $crate::sinks::SinkArgs
    };
    ([$element:ty]) => {
        u64
    };
    ($scalar:ty) => {
        $scalar
    };
}

macro_rules! declare {
    ($code:ident, (tensor $n:literal), $name:expr) => {
        $crate::tensor::TensorParam::<$n>::declare($code, $name)
    };
    ($code:ident, input, $name:expr) => {
        $crate::preprocess::InputParams::declare($code)
    };
    ($code:ident, pool, $name:expr) => {
        $crate::decode::PoolParams::declare($code)
    };
    ($code:ident, per_head, $name:expr) => {
        $crate::predict::PerHeadParam::declare($code, $name)
    };
    ($code:ident, tokens, $name:expr) => {
        $crate::predict::TokensParams::declare($code)
    };
    ($code:ident, lengths, $name:expr) => {
        $crate::sequence::LengthParams::declare($code)
    };
    ($code:ident, sinks, $name:expr) => {
        None
    };
    ($code:ident, [$element:ty], $name:expr) => {
        $code.global::<$element>($name)
    };
    ($code:ident, $scalar:ty, $name:expr) => {
        $code.param::<$scalar>($name)
    };
}

macro_rules! count {
    ((tensor $n:literal)) => {
        $n + 1
    };
    (input) => {
        $crate::preprocess::InputArgs::COUNT
    };
    (pool) => {
        $crate::decode::PoolTensors::COUNT
    };
    (per_head) => {
        $crate::predict::PerHeadArg::COUNT
    };
    (tokens) => {
        $crate::predict::TokensArgs::COUNT
    };
    (lengths) => {
        $crate::sequence::LengthArgs::COUNT
    };
    (sinks) => {
        0
    };
    ($kind:tt) => {
        1
    };
}

macro_rules! arg {
    ((tensor $n:literal), $value:expr) => {
        $value.args()
    };
    (input, $value:expr) => {
        $value.args()
    };
    (pool, $value:expr) => {
        $value.args()
    };
    (per_head, $value:expr) => {
        $value.args()
    };
    (tokens, $value:expr) => {
        $value.args()
    };
    (lengths, $value:expr) => {
        $value.args()
    };
    (sinks, $value:expr) => {
        []
    };
    ([$element:ty], $value:expr) => {
        [sage_ptx::Arg::Pointer($value)]
    };
    (i32, $value:expr) => {
        [sage_ptx::Arg::I32($value)]
    };
    (i64, $value:expr) => {
        [sage_ptx::Arg::I64($value)]
    };
    (f32, $value:expr) => {
        [sage_ptx::Arg::F32($value)]
    };
}

pub(crate) use {arg, count, declare, inside, kernel_params, outside};
