/* Fails the n-th system call that touches a folder: a disk that is full, broken, slow or gone.
 *
 * Preloaded into a process it stands between the program (Python, numpy, the safetensors package's Rust)
 * and the C library. Nothing happens until `faults_arm`; only calls on files under one root are counted.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, READ = 2, WRITE = 4, SYNC = 8, RENAME = 16, RESIZE = 32, COPY = 64, UNLINK = 128, MKDIR = 256,
       MODE = 512, STAT = 1024, LOCK = 2048, LIST = 4096, MAP = 8192 };
enum { ONCE = 0, ONWARD = 1, SHORT = 2, END = 3, SIGNAL = 4 };

static char root[PATH_MAX];
static size_t root_length;
static unsigned kinds;
static long target;
static int failure, style, armed;
static _Atomic long seen, hit;

/* style ONCE: the n-th call fails with `number`; ONWARD: so do all after it; SHORT: it moves half of the bytes;
 * END: it reads nothing, as at the end of a file; SIGNAL: the process gets signal `number` before it. */
void faults_arm(const char *folder, unsigned which, long nth, int how, int number)
{
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    kinds = which, target = nth, style = how, failure = number;
    seen = hit = 0;
    armed = 1;
}

void faults_disarm(void) { armed = 0; }
long faults_seen(void) { return seen; }
long faults_hit(void) { return hit; }

static int inside(const char *path)
{
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static int fd_inside(int fd)
{
    char link[32], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    return inside(path);
}

static int path_inside(int folder, const char *path)
{
    char here[PATH_MAX];
    if (path == NULL || *path == 0)
        return folder >= 0 && fd_inside(folder);
    if (*path == '/')
        return inside(path);
    if (folder >= 0)
        return fd_inside(folder);
    return getcwd(here, sizeof here) != NULL && inside(here);
}

/* What is to become of a call: 0 nothing, 1 it fails (errno is set), 2 it is cut short, 3 it reads the end. */
static int verdict(unsigned kind)
{
    if (!(kinds & kind))
        return 0;
    long number = atomic_fetch_add(&seen, 1);
    if (number != target && !(style == ONWARD && number > target))
        return 0;
    atomic_fetch_add(&hit, 1);
    switch (style) {
    case SHORT:
        return 2;
    case END:
        return 3;
    case SIGNAL:
        kill(getpid(), failure);
        return 0;
    }
    errno = failure;
    return 1;
}

#define ON_FD(kind, fd) (armed && fd_inside(fd) ? verdict(kind) : 0)
#define ON_PATH(kind, folder, path) (armed && path_inside(folder, path) ? verdict(kind) : 0)
#define REAL(name) ({ static __typeof__(&name) f; if (!f) f = (__typeof__(&name))dlsym(RTLD_NEXT, #name); f; })
#define HALF(count) ((count) > 1 ? (count) / 2 : (count))

#define OPENING(name)                                                        \
    int name(const char *path, int flags, ...)                               \
    {                                                                        \
        va_list more;                                                        \
        va_start(more, flags);                                               \
        mode_t mode = va_arg(more, mode_t);                                  \
        va_end(more);                                                        \
        if (ON_PATH(OPEN, -1, path) == 1)                                    \
            return -1;                                                       \
        return REAL(name)(path, flags, mode);                                \
    }
OPENING(open)
OPENING(open64)

#define OPENING_AT(name)                                                     \
    int name(int folder, const char *path, int flags, ...)                   \
    {                                                                        \
        va_list more;                                                        \
        va_start(more, flags);                                               \
        mode_t mode = va_arg(more, mode_t);                                  \
        va_end(more);                                                        \
        if (ON_PATH(OPEN, folder, path) == 1)                                \
            return -1;                                                       \
        return REAL(name)(folder, path, flags, mode);                        \
    }
OPENING_AT(openat)
OPENING_AT(openat64)

/* Reads and writes: fail, or move fewer bytes than asked for. */
#define MOVING(name, kind, buffer_type)                                      \
    ssize_t name(int fd, buffer_type buffer, size_t count)                   \
    {                                                                        \
        int what = ON_FD(kind, fd);                                          \
        if (what == 1 || what == 3)                                          \
            return what == 1 ? -1 : 0;                                       \
        return REAL(name)(fd, buffer, what == 2 ? HALF(count) : count);      \
    }
MOVING(read, READ, void *)
MOVING(write, WRITE, const void *)

#define MOVING_AT(name, kind, buffer_type, offset_type)                      \
    ssize_t name(int fd, buffer_type buffer, size_t count, offset_type at)   \
    {                                                                        \
        int what = ON_FD(kind, fd);                                          \
        if (what == 1 || what == 3)                                          \
            return what == 1 ? -1 : 0;                                       \
        return REAL(name)(fd, buffer, what == 2 ? HALF(count) : count, at);  \
    }
MOVING_AT(pread, READ, void *, off_t)
MOVING_AT(pread64, READ, void *, off64_t)
MOVING_AT(pwrite, WRITE, const void *, off_t)
MOVING_AT(pwrite64, WRITE, const void *, off64_t)

#define VECTOR(name, offset_type)                                            \
    ssize_t name(int fd, const struct iovec *parts, int count, offset_type at) \
    {                                                                        \
        int what = ON_FD(READ, fd);                                          \
        if (what == 1 || what == 3)                                          \
            return what == 1 ? -1 : 0;                                       \
        if (what == 2 && count == 1) {                                       \
            struct iovec part = {parts->iov_base, HALF(parts->iov_len)};     \
            return REAL(name)(fd, &part, 1, at);                             \
        }                                                                    \
        return REAL(name)(fd, parts, count, at);                             \
    }
VECTOR(preadv, off_t)
VECTOR(preadv64, off64_t)

#define VECTOR_2(name, offset_type)                                          \
    ssize_t name(int fd, const struct iovec *parts, int count, offset_type at, int flags) \
    {                                                                        \
        int what = ON_FD(READ, fd);                                          \
        if (what == 1 || what == 3)                                          \
            return what == 1 ? -1 : 0;                                       \
        if (what == 2 && count == 1) {                                       \
            struct iovec part = {parts->iov_base, HALF(parts->iov_len)};     \
            return REAL(name)(fd, &part, 1, at, flags);                      \
        }                                                                    \
        return REAL(name)(fd, parts, count, at, flags);                      \
    }
VECTOR_2(preadv2, off_t)
VECTOR_2(preadv64v2, off64_t)

ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *place, size_t count, unsigned flags)
{
    int what = ON_FD(COPY, to);
    if (what == 1 || what == 3)
        return what == 1 ? -1 : 0;
    return REAL(copy_file_range)(from, start, to, place, what == 2 ? HALF(count) : count, flags);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    if (request == FICLONE && ON_FD(COPY, fd) == 1)
        return -1;
    return REAL(ioctl)(fd, request, argument);
}

#define PLAIN(kind, on, name, parameters, arguments)                         \
    int name parameters                                                      \
    {                                                                        \
        if (on == 1)                                                         \
            return -1;                                                       \
        return REAL(name) arguments;                                         \
    }
PLAIN(SYNC, ON_FD(SYNC, fd), fsync, (int fd), (fd))
PLAIN(SYNC, ON_FD(SYNC, fd), fdatasync, (int fd), (fd))
PLAIN(RESIZE, ON_FD(RESIZE, fd), ftruncate, (int fd, off_t size), (fd, size))
PLAIN(RESIZE, ON_FD(RESIZE, fd), ftruncate64, (int fd, off64_t size), (fd, size))
PLAIN(MODE, ON_FD(MODE, fd), fchmod, (int fd, mode_t mode), (fd, mode))
PLAIN(MODE, ON_PATH(MODE, -1, path), chmod, (const char *path, mode_t mode), (path, mode))
PLAIN(LOCK, ON_FD(LOCK, fd), flock, (int fd, int how), (fd, how))
PLAIN(RENAME, ON_PATH(RENAME, -1, a), rename, (const char *a, const char *b), (a, b))
PLAIN(RENAME, ON_PATH(RENAME, f, a), renameat, (int f, const char *a, int g, const char *b), (f, a, g, b))
PLAIN(RENAME, ON_PATH(RENAME, f, a), renameat2, (int f, const char *a, int g, const char *b, unsigned how),
      (f, a, g, b, how))
PLAIN(RENAME, ON_PATH(RENAME, -1, a), link, (const char *a, const char *b), (a, b))
PLAIN(RENAME, ON_PATH(RENAME, f, a), linkat, (int f, const char *a, int g, const char *b, int how),
      (f, a, g, b, how))
PLAIN(UNLINK, ON_PATH(UNLINK, -1, path), unlink, (const char *path), (path))
PLAIN(UNLINK, ON_PATH(UNLINK, -1, path), rmdir, (const char *path), (path))
PLAIN(UNLINK, ON_PATH(UNLINK, f, path), unlinkat, (int f, const char *path, int how), (f, path, how))
PLAIN(MKDIR, ON_PATH(MKDIR, -1, path), mkdir, (const char *path, mode_t mode), (path, mode))
PLAIN(STAT, ON_PATH(STAT, -1, path), stat, (const char *path, struct stat *to), (path, to))
PLAIN(STAT, ON_PATH(STAT, -1, path), stat64, (const char *path, struct stat64 *to), (path, to))
PLAIN(STAT, ON_PATH(STAT, -1, path), lstat, (const char *path, struct stat *to), (path, to))
PLAIN(STAT, ON_PATH(STAT, -1, path), lstat64, (const char *path, struct stat64 *to), (path, to))
PLAIN(STAT, ON_FD(STAT, fd), fstat, (int fd, struct stat *to), (fd, to))
PLAIN(STAT, ON_FD(STAT, fd), fstat64, (int fd, struct stat64 *to), (fd, to))
PLAIN(STAT, ON_PATH(STAT, -1, path), statvfs, (const char *path, struct statvfs *to), (path, to))
PLAIN(STAT, ON_PATH(STAT, -1, path), statvfs64, (const char *path, struct statvfs64 *to), (path, to))

DIR *opendir(const char *path)
{
    return ON_PATH(LIST, -1, path) == 1 ? NULL : REAL(opendir)(path);
}

DIR *fdopendir(int fd)
{
    return ON_FD(LIST, fd) == 1 ? NULL : REAL(fdopendir)(fd);
}

#define MAPPING(name, offset_type)                                           \
    void *name(void *where, size_t size, int protection, int flags, int fd, offset_type at) \
    {                                                                        \
        if (fd >= 0 && ON_FD(MAP, fd) == 1)                                  \
            return MAP_FAILED;                                               \
        return REAL(name)(where, size, protection, flags, fd, at);           \
    }
MAPPING(mmap, off_t)
MAPPING(mmap64, off64_t)
