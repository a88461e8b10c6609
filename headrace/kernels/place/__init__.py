"""The operation `place`: where in a group's pool the rows of a step are written.

Row r of request q writes slot s = kv_len[q] + dst[r], which lies in page page_table[q, s // S] at offset s % S. A slot
outside the table lies in the trash page. Letters: R rows, Bmax request indices (index Bmax is the ghost), Pmax pages of
a request at most, S slots in a page.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.place.reference import place_reference

__all__ = ["place"]


def place(req_R: Tensor, dst_R: Tensor, kv_len_B: Tensor, page_table_BP: Tensor, page_size: int) -> Tensor:
    """Physical slots, int64 [R]. The CPU and a GPU run compiled forms. No host synchronisation.

    Args:
        req_R: request indices, int32 [R].
        dst_R: slots of the rows behind the committed ones, int32 [R].
        kv_len_B: committed slots by request index, int32 [Bmax+1].
        page_table_BP: pages by request index, int32 [Bmax+1, Pmax].
        page_size: S.
    """
    if req_R.device.type == "cpu":
        from headrace.kernels.place.cpu import place_cpu  # numba is loaded where it is used

        return place_cpu(req_R, dst_R, kv_len_B, page_table_BP, page_size)
    if req_R.device.type == "cuda":
        from headrace.kernels.place.gpu import place_gpu  # Triton is loaded where it is used

        return place_gpu(req_R, dst_R, kv_len_B, page_table_BP, page_size)
    return place_reference(req_R, dst_R, kv_len_B, page_table_BP, page_size)
