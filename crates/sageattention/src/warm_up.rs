//! Compiling what calls need before they are made.

use sage_core::{Error, Result};
use sage_gpu::{Cuda, LoadedKernel, TensorShape, WarmUp};

use crate::attention::Attention;
use crate::backend::Device;
use crate::kv_cache::KvCacheOptions;

impl Attention<'_> {
    /// Compiles and loads the kernels of calls with tensors `[q, k, v]` of these shapes, side by side: later calls of
    /// this process compile nothing, and those of later processes find what the disk keeps. Says of each kernel what
    /// it took.
    ///
    /// The device is that of [`Attention::device`], by the number that [`Cuda::shared`] has it. What calls are
    /// planned by must be that of the calls to come: shapes, strides, element type and all options, and where the
    /// log-sum-exp is wanted [`Attention::return_lse`]. Tensors are taken to begin at multiples of 16 bytes. A mask
    /// is given as a shape, of packed sequences the boundaries are read.
    ///
    /// ```no_run
    /// use sageattention::cuda::TensorShape;
    /// use sageattention::{Attention, DType, Device};
    ///
    /// let q = TensorShape::contiguous(DType::BF16, &[1, 32, 4096, 128])?;
    /// let k = TensorShape::contiguous(DType::BF16, &[1, 8, 4096, 128])?;
    /// for kernel in Attention::new().causal(true).device(Device::Cuda(0)).warm_up(&[[q, k, k]])? {
    ///     println!("{} {:?} {:?}", kernel.name, kernel.origin, kernel.time);
    /// }
    /// # Ok::<(), sageattention::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Attention::forward_on`], without a device, and without a GPU for it. A processor has nothing to compile.
    pub fn warm_up(&self, calls: &[[TensorShape; 3]]) -> Result<Vec<LoadedKernel>> {
        let ordinal = match self.chosen_device() {
            Some(Device::Cuda(ordinal)) => ordinal,
            Some(Device::Cpu) => return Ok(Vec::new()),
            None => {
                return Err(Error::value("device", "none", "cuda:N, or cpu, which has nothing to compile"));
            }
        };
        let warm_up = Cuda::shared(ordinal)?.warm_up();
        calls.iter().try_for_each(|tensors| self.note(&warm_up, *tensors))?;
        warm_up.load()
    }

    /// Notes what a call with tensors `[q, k, v]` of these shapes needs, for [`WarmUp::load`].
    ///
    /// # Errors
    /// As [`Attention::forward_on`], of which nothing is done but the planning.
    pub fn note(&self, warm_up: &WarmUp, tensors: [TensorShape; 3]) -> Result<()> {
        let lse = self.returns_lse().then_some(());
        self.forward_on(warm_up, &(), tensors, (), lse).map(drop)
    }
}

impl KvCacheOptions {
    /// Notes what a cache needs, for [`WarmUp::load`], to take new tokens `k`, of any number, and to attend to as
    /// many with queries `q`. How tokens are split between multiprocessors depends on their number: note both that at
    /// the beginning and that at the end of a generation. [`KvCacheOptions::max_pages`] must be set, as on a GPU.
    ///
    /// # Errors
    /// When the shapes do not fit the cache or its options are none that a GPU's can have.
    pub fn note(
        &self,
        warm_up: &WarmUp,
        attention: &Attention<'_>,
        q: TensorShape,
        k: TensorShape,
    ) -> Result<()> {
        let mut cache = self.build_on(warm_up.clone(), &())?;
        cache.append(k, k)?;
        let all: Vec<usize> = (0..cache.sequences()).collect();
        cache.attend_into(&all, q, attention, (), attention.returns_lse().then_some(()))
    }
}
