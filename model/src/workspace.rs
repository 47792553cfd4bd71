//! What the operations of a model run with: the threads, and memory that is used again.
//!
//! Secret: which memory is free. A step asks for buffers of the same lengths as the one before, so it finds them all and
//! asks the system for nothing. Knows nothing of what is kept in a buffer.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guild_kernels::Cpu;

/// Bytes of each kind of buffer that are kept while nobody uses them; what is given back beyond goes to the system.
/// Enough for all buffers of a step of some hundred rows of the largest models.
const KEPT_BYTES: usize = 512 << 20;
/// Elements of the smallest buffer.
const LEAST: usize = 64;

/// Threads and reusable memory. Clones share both.
#[derive(Clone)]
pub struct Workspace {
    cpu: Cpu,
    shelves: Arc<Shelves>,
}

#[derive(Default)]
struct Shelves {
    floats: Mutex<Shelf<f32>>,
    ids: Mutex<Shelf<u32>>,
}

/// Buffers that nobody uses.
struct Shelf<T> {
    /// By the binary logarithm of their elements.
    free: Vec<Vec<Box<[T]>>>,
    bytes: usize,
}

impl<T> Default for Shelf<T> {
    fn default() -> Self {
        Shelf {
            free: Vec::new(),
            bytes: 0,
        }
    }
}

impl Workspace {
    /// One without memory yet.
    pub fn new(cpu: &Cpu) -> Workspace {
        Workspace {
            cpu: cpu.clone(),
            shelves: Arc::default(),
        }
    }

    /// The threads.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// A buffer of `len` elements. They are whatever was left in it: the caller writes all that it reads.
    pub fn take<T: Element>(&self, len: usize) -> Buffer<T> {
        let elements = len.max(LEAST).next_power_of_two();
        let class = elements.ilog2() as usize;
        let mut shelf = lock(T::shelf(&self.shelves));
        let kept = shelf.free.get_mut(class).and_then(Vec::pop);
        shelf.bytes -= kept.as_ref().map_or(0, |kept| size_of_val(&**kept));
        drop(shelf);
        let memory = kept.unwrap_or_else(|| vec![T::default(); elements].into_boxed_slice());
        let mut buffer = Buffer {
            memory,
            len,
            home: Some(Arc::clone(&self.shelves)),
        };
        if cfg!(debug_assertions) {
            buffer.fill(T::NOTHING);
        }
        buffer
    }
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workspace")
            .field("cpu", &self.cpu)
            .finish_non_exhaustive()
    }
}

fn lock<T>(shelf: &Mutex<Shelf<T>>) -> MutexGuard<'_, Shelf<T>> {
    // Nothing that could leave a shelf in disorder runs under the lock.
    shelf.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What buffers are of.
pub trait Element: sealed::Kept + Copy + Default + fmt::Debug + PartialEq + Send + 'static {}

impl Element for f32 {}
impl Element for u32 {}

mod sealed {
    use super::{Mutex, Shelf, Shelves};

    pub trait Kept: Sized {
        /// What tests find in a buffer that nobody has written.
        const NOTHING: Self;

        #[allow(private_interfaces, reason = "nobody outside can name this trait")]
        fn shelf(shelves: &Shelves) -> &Mutex<Shelf<Self>>;
    }

    impl Kept for f32 {
        const NOTHING: Self = f32::NAN;

        #[allow(private_interfaces, reason = "nobody outside can name this trait")]
        fn shelf(shelves: &Shelves) -> &Mutex<Shelf<Self>> {
            &shelves.floats
        }
    }

    impl Kept for u32 {
        const NOTHING: Self = u32::MAX;

        #[allow(private_interfaces, reason = "nobody outside can name this trait")]
        fn shelf(shelves: &Shelves) -> &Mutex<Shelf<Self>> {
            &shelves.ids
        }
    }
}

/// A slice that goes back to its workspace when it is dropped.
pub struct Buffer<T: Element = f32> {
    /// At least `len` long.
    memory: Box<[T]>,
    len: usize,
    /// None: it has come from elsewhere.
    home: Option<Arc<Shelves>>,
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        let Some(home) = &self.home else { return };
        let memory = std::mem::take(&mut self.memory);
        let (class, bytes) = (memory.len().ilog2() as usize, size_of_val(&*memory));
        let mut shelf = lock(T::shelf(home));
        if shelf.bytes + bytes > KEPT_BYTES {
            // Giving memory back to the system takes long.
            drop(shelf);
            return drop(memory);
        }
        shelf.bytes += bytes;
        if shelf.free.len() <= class {
            shelf.free.resize_with(class + 1, Vec::new);
        }
        shelf.free[class].push(memory);
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.memory[..self.len]
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[..self.len]
    }
}

impl<'a, T: Element> IntoIterator for &'a Buffer<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<T: Element> From<Vec<T>> for Buffer<T> {
    fn from(values: Vec<T>) -> Self {
        Buffer {
            len: values.len(),
            memory: values.into_boxed_slice(),
            home: None,
        }
    }
}

impl<T: Element> FromIterator<T> for Buffer<T> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        Vec::from_iter(values).into()
    }
}

impl<T: Element> Clone for Buffer<T> {
    /// A copy without a workspace.
    fn clone(&self) -> Self {
        self.to_vec().into()
    }
}

impl<T: Element> PartialEq for Buffer<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Element> PartialEq<Vec<T>> for Buffer<T> {
    fn eq(&self, other: &Vec<T>) -> bool {
        **self == **other
    }
}

impl<T: Element> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(workspace: &Workspace) -> usize {
        let shelf = lock(&workspace.shelves.floats);
        let free: usize = { shelf.free.iter().flatten() }
            .map(|memory| size_of_val(&**memory))
            .sum();
        assert_eq!(free, shelf.bytes);
        free
    }

    #[test]
    fn a_buffer_that_has_gone_is_used_again() {
        let workspace = Workspace::new(&Cpu::new(1));
        let first = workspace.take::<f32>(1000);
        let other = workspace.take::<f32>(1000);
        let at = [first.as_ptr(), other.as_ptr()];
        assert_ne!(at[0], at[1]);
        assert_eq!(free(&workspace), 0);
        drop((first, other));
        assert_eq!(free(&workspace), 2 * 1024 * 4);
        // Of another length, but no larger than what is there.
        let again = workspace.take::<f32>(700);
        assert!(at.contains(&again.as_ptr()));
        assert_eq!(again.len(), 700);
        assert_eq!(free(&workspace), 1024 * 4);
    }

    #[test]
    fn what_is_kept_is_limited() {
        let workspace = Workspace::new(&Cpu::new(1));
        // Nobody touches them: they take address space alone. Filled ones would be 1 GiB.
        let memory = || vec![0.0f32; KEPT_BYTES / 16].into_boxed_slice();
        for _ in 0..10 {
            drop(Buffer {
                len: 1,
                memory: memory(),
                home: Some(Arc::clone(&workspace.shelves)),
            });
            drop(Buffer::from(vec![1.0f32; 64]));
        }
        let buffers: Vec<Buffer> = { 0..10 }
            .map(|_| Buffer {
                len: 1,
                memory: memory(),
                home: Some(Arc::clone(&workspace.shelves)),
            })
            .collect();
        drop(buffers);
        assert_eq!(free(&workspace), KEPT_BYTES);
    }
}
