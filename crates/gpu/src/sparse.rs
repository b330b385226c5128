//! Attention over blocks that are predicted.

use std::sync::Arc;

use sage_core::sparse::{BlockMap, Predictor};
use sage_core::{Backend, Call, Choice, Result, SparseBackend, TensorViewMut};
use sage_cuda::Stream;

use crate::host::{self, as_if_copied};
use crate::{Cuda, CudaMap, CudaPlan, DeviceCall, DeviceLse, DeviceTensor, HostTensors};

/// Predicts on the caller's stream, without waiting for it, and as part of a graph. Numbers that heads have of their own,
/// and sizes of padded blocks, are copied to the GPU at their first use, which waits for the copy and cannot be part of
/// a graph, and stay there.
impl SparseBackend for Cuda {
    type Map = CudaMap;

    fn plan_sparse<'c>(
        &self,
        call: &DeviceCall<'c>,
        predictor: &Predictor,
        choice: Choice,
        lse: bool,
    ) -> Result<Arc<CudaPlan>> {
        let prediction = self.prediction(call, predictor)?;
        self.plan_over(call, [predictor.block_q, predictor.block_k], prediction, choice, lse)
    }

    fn predict<'c>(&self, stream: &Stream, call: &DeviceCall<'c>, predictor: &Predictor) -> Result<CudaMap> {
        self.predict_map(stream, call, predictor)
    }

    fn run_sparse<'c>(
        &self,
        stream: &Stream,
        call: &DeviceCall<'c>,
        predictor: &Predictor,
        choice: Choice,
        out: DeviceTensor<'_>,
        lse: Option<DeviceLse<'_>>,
    ) -> Result<CudaMap> {
        let map = self.predict_map(stream, call, predictor)?;
        self.run(stream, &map.call(call), choice, out, lse)?;
        Ok(map)
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
        self.0.plan_sparse(&as_if_copied(call), predictor, choice, lse)
    }

    fn predict<'c>(&self, (): &(), call: &Call<'c>, predictor: &Predictor) -> Result<BlockMap> {
        // Nothing is copied for what no kernel predicts.
        self.0.prediction(&as_if_copied(call), predictor)?;
        let stream = self.0.stream()?;
        let [q, k] = [&call.q, &call.k].map(|tensor| crate::CudaTensor::upload(&stream, tensor));
        let (q, k) = (q?, k?);
        let there = call.moved([q.view(), k.view(), k.view()], None, None, None);
        self.0.predict_map(&stream, &there, predictor)?.to_host()
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
        call.check_output(out.dtype(), out.geometry())?;
        call.check_lse(lse.as_deref())?;
        self.plan_sparse(call, predictor, choice, lse.is_some())?;
        host::on_copies(&self.0, call, out, lse, |stream, there, out, lse| {
            self.0.run_sparse(stream, there, predictor, choice, out, lse)?.to_host()
        })
    }
}
