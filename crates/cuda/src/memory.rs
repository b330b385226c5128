//! Memory on a GPU, allocated and freed in a stream's order.

use std::ptr;

use cudarc::driver::sys::{CUDA_MEMCPY2D, CUdeviceptr, CUmemorytype};
use sage_ptx::Arg;

use crate::driver::{cu, report};
use crate::error::{Error, Result};
use crate::stream::Stream;

/// Memory on a GPU that belongs to a [`Stream`]: it exists from that point of the stream's work on, and is freed at the
/// point of the stream's work where the buffer is dropped. Another stream that uses it has to wait for the first point
/// and be waited for before the second.
///
/// The memory comes from the device's default pool, which keeps what is freed, so that a warm allocation costs no
/// system call. Where the driver has no pools, allocating and freeing wait for the GPU.
///
/// While the stream is captured, allocating and freeing become part of the graph. Drop such a buffer before the capture
/// ends; what it holds exists only while the graph runs. A buffer from before the capture that is dropped within it is
/// freed when the capture is over.
#[derive(Debug)]
pub struct Buffer {
    stream: Stream,
    address: CUdeviceptr,
    bytes: usize,
    of_a_capture: bool,
}

impl Buffer {
    /// `bytes` bytes of unknown content, aligned to 256 bytes. Of nothing, the address is 0.
    pub fn new(stream: &Stream, bytes: usize) -> Result<Buffer> {
        let mut buffer = Buffer { stream: stream.clone(), address: 0, bytes, of_a_capture: false };
        if bytes == 0 {
            return Ok(buffer);
        }
        stream.free_the_unfreed();
        buffer.of_a_capture = stream.is_capturing()?;
        let _entered = stream.device().enter()?;
        let mut address = 0;
        if stream.device().has_pools() {
            // SAFETY: the pointer is to a local, the stream is alive and its context current.
            unsafe { cu!(cuMemAllocAsync(&mut address, bytes, stream.raw())) }?;
        } else {
            // SAFETY: the pointer is to a local, and the context is current.
            unsafe { cu!(cuMemAlloc_v2(&mut address, bytes)) }?;
        }
        buffer.address = address;
        Ok(buffer)
    }

    /// A copy of `values`. Waits for the copy, like [`copy_from_host`](Buffer::copy_from_host).
    pub fn from_slice<T: bytemuck::NoUninit>(stream: &Stream, values: &[T]) -> Result<Buffer> {
        let mut buffer = Buffer::new(stream, size_of_val(values))?;
        buffer.copy_from_host(values)?;
        Ok(buffer)
    }

    /// Address in global memory.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The address as a kernel's argument.
    pub fn arg(&self) -> Arg {
        Arg::Pointer(self.address)
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The stream that the memory belongs to.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Sets every byte, in the stream's order and without waiting.
    pub fn fill(&mut self, byte: u8) -> Result<()> {
        self.fill_start(self.bytes, byte)
    }

    /// Sets the first `bytes` bytes, or all where there are fewer, in the stream's order and without waiting.
    pub fn fill_start(&mut self, bytes: usize, byte: u8) -> Result<()> {
        let bytes = bytes.min(self.bytes);
        if bytes == 0 {
            return Ok(());
        }
        let _entered = self.stream.device().enter()?;
        // SAFETY: the range is this buffer's, and the stream is the one it was allocated on.
        unsafe { cu!(cuMemsetD8Async(self.address, byte, bytes, self.stream.raw())) }
    }

    /// Copies `values`, which must have the buffer's size, and waits until they are there. Refused during a capture: a
    /// replay would read host memory that is long gone.
    pub fn copy_from_host<T: bytemuck::NoUninit>(&mut self, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if !self.check_copy(bytes.len())? {
            return Ok(());
        }
        let entered = self.stream.device().enter()?;
        // SAFETY: both ranges are `bytes` long, and the borrow lasts until the copy is done, below.
        let copied = unsafe {
            cu!(cuMemcpyHtoDAsync_v2(self.address, bytes.as_ptr().cast(), bytes.len(), self.stream.raw()))
        };
        drop(entered);
        let done = self.stream.synchronize();
        copied.and(done)
    }

    /// Copies the buffer into `values`, which must have its size, after all work so far on the stream, and waits for
    /// it. Refused during a capture.
    pub fn copy_to_host<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        values: &mut [T],
    ) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        if !self.check_copy(bytes.len())? {
            return Ok(());
        }
        let entered = self.stream.device().enter()?;
        // SAFETY: both ranges are `bytes` long, and the borrow lasts until the copy is done, below.
        let copied = unsafe {
            cu!(cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), self.address, bytes.len(), self.stream.raw()))
        };
        drop(entered);
        let done = self.stream.synchronize();
        copied.and(done)
    }

    /// Copies the buffer as `rows` rows of equal length to memory of the device where rows have `pitch` bytes, from
    /// `address` on, and fills them up with zeros; in the stream's order and without waiting.
    ///
    /// # Errors
    /// When the buffer is not so many rows of at most `pitch` bytes, and what the driver says.
    ///
    /// # Safety
    /// The device has `rows * pitch` bytes there, which nobody else uses until the copy is done.
    pub unsafe fn copy_rows_to(&self, address: u64, rows: usize, pitch: usize) -> Result<()> {
        let width = self.bytes / rows.max(1);
        if width * rows != self.bytes || pitch < width {
            let wanted =
                format!("the buffer's {} bytes in rows of equal length of at most {pitch}", self.bytes);
            return Err(Error::value("rows of a copy", rows, wanted));
        }
        let _entered = self.stream.device().enter()?;
        if pitch > width && rows > 0 {
            // SAFETY: the caller answers for the target.
            unsafe { cu!(cuMemsetD8Async(address, 0, rows * pitch, self.stream.raw())) }?;
        }
        if self.bytes == 0 {
            return Ok(());
        }
        if pitch == width {
            // SAFETY: the source is this buffer, whose stream this is; of the target as above.
            return unsafe {
                cu!(cuMemcpyDtoDAsync_v2(address, self.address, self.bytes, self.stream.raw()))
            };
        }
        let copy = CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: ptr::null(),
            srcDevice: self.address,
            srcArray: ptr::null_mut(),
            srcPitch: width,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: address,
            dstArray: ptr::null_mut(),
            dstPitch: pitch,
            WidthInBytes: width,
            Height: rows,
        };
        // SAFETY: as above; the driver has read the description when it returns.
        unsafe { cu!(cuMemcpy2DAsync_v2(&copy, self.stream.raw())) }
    }

    /// The content as values of type `T`, of which the buffer must hold a whole number; waits like
    /// [`copy_to_host`](Buffer::copy_to_host).
    pub fn to_vec<T: bytemuck::Zeroable + bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
    ) -> Result<Vec<T>> {
        let size = size_of::<T>().max(1);
        if !self.bytes.is_multiple_of(size) {
            let wanted = format!("a multiple of {size}, the size of {}", std::any::type_name::<T>());
            return Err(Error::value("buffer's size in bytes", self.bytes, wanted));
        }
        let mut values = vec![T::zeroed(); self.bytes / size];
        self.copy_to_host(&mut values)?;
        Ok(values)
    }

    /// Whether there is anything to copy, after the checks that all copies share.
    fn check_copy(&self, found: usize) -> Result<bool> {
        if found != self.bytes {
            return Err(Error::value(
                "host memory's size in bytes",
                found,
                format!("the buffer's, {}", self.bytes),
            ));
        }
        if found > 0 && self.stream.is_capturing()? {
            return Err(Error::value("stream of a host copy", "being captured", "one that is not"));
        }
        Ok(found > 0)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.address == 0 {
            return;
        }
        if self.stream.device().has_pools() {
            // SAFETY: allocated by `new` from the pool, freed once; later users are the caller's to order.
            unsafe { self.stream.free(self.address, self.of_a_capture) };
        } else {
            report(self.stream.device().enter().and_then(|_entered| {
                // SAFETY: allocated by `new` without a pool, freed once; the driver waits for running work.
                unsafe { cu!(cuMemFree_v2(self.address)) }
            }));
        }
    }
}
