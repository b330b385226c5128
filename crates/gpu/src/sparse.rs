//! Attention over blocks that are predicted.

use std::sync::Arc;

use sage_core::sparse::{BlockMap, Predictor};
use sage_core::{Backend, Call, Choice, Error, Result, SparseBackend, TensorViewMut};
use sage_cuda::Stream;

use crate::{Cuda, CudaPlan, DeviceCall, DeviceLse, DeviceTensor, HostTensors};

impl SparseBackend for Cuda {
    type Map = BlockMap;

    fn plan_sparse<'c>(
        &self,
        _: &DeviceCall<'c>,
        _: &Predictor,
        _: Choice,
        _: bool,
    ) -> Result<Arc<CudaPlan>> {
        Err(no_predictor())
    }

    fn predict<'c>(&self, _: &Stream, _: &DeviceCall<'c>, _: &Predictor) -> Result<BlockMap> {
        Err(no_predictor())
    }

    fn run_sparse<'c>(
        &self,
        _: &Stream,
        _: &DeviceCall<'c>,
        _: &Predictor,
        _: Choice,
        _: DeviceTensor<'_>,
        _: Option<DeviceLse<'_>>,
    ) -> Result<BlockMap> {
        Err(no_predictor())
    }
}

impl SparseBackend for HostTensors {
    type Map = BlockMap;

    fn plan_sparse<'c>(
        &self,
        call: &Call<'c>,
        predictor: &Predictor,
        choice: Choice,
        lse: bool,
    ) -> Result<Arc<CudaPlan>> {
        let map = predictor.map_of_flags(&call.problem, predictor.cleared_flags(&call.problem)?)?;
        self.plan(&call.over(&map)?, choice, lse)
    }

    fn predict<'c>(&self, (): &(), call: &Call<'c>, predictor: &Predictor) -> Result<BlockMap> {
        predictor.map(call)
    }

    fn run_sparse<'c>(
        &self,
        (): &(),
        call: &Call<'c>,
        predictor: &Predictor,
        choice: Choice,
        out: TensorViewMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<BlockMap> {
        let map = predictor.map(call)?;
        self.run(&(), &call.over(&map)?, choice, out, lse)?;
        Ok(map)
    }
}

/// The error of a prediction from tensors in a GPU's memory.
fn no_predictor() -> Error {
    Error::unsupported("a predictor of tensors in a GPU's memory", "predict the map on the host")
}
